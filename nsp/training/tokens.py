"""The training pictures as tokens: made once by the frozen tokenizer, kept in a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nsp.data.dataset import ImageDataset, to_model_range
from nsp.errors import ConfigError
from nsp.family.objective import TokenCache
from nsp.training.cache import cached, digest_of, is_constant, write_cache

_BATCH = 64  # pictures tokenized at once

# What the pictures of a model are drawn from: the function from captions to token ids (N, T), or
# the number of classes.
Conditions: TypeAlias = "Callable[[Sequence[str]], Tensor] | int"


@dataclass(frozen=True)
class Tokenizing:
    """The part of a model that makes tokens of pictures."""

    module: nn.Module  # whose weights decide the tokens
    tokens: Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) in [-1, 1] -> tokens (B, L)
    about: object  # settings that decide the tokens
    others: tuple[str, ...]  # beginnings of the names of weights that do not

    def key(self, data: ImageDataset) -> str:
        """Return the digest of all that decides the tokens of these pictures."""
        about = (self.about, data.crop)
        return digest_of(
            about, self.module, data, decides=lambda name: not name.startswith(self.others)
        )


class TokenDataset(Dataset[Mapping[str, object]]):
    """Conditions with tokens, or with pictures if crops and flips change the tokens.

    Without crops and flips, tokens are computed once; `cache` is the file that keeps them.
    """

    def __init__(
        self,
        data: ImageDataset,
        tokenizing: Tokenizing,
        conditions: Conditions,
        cache: TokenCache | None = None,
    ) -> None:
        self._data = data
        self._is_text = not isinstance(conditions, int)
        self._conditions = (
            class_ids(data, conditions)
            if isinstance(conditions, int)
            else conditions(data.captions())
        )
        self._tokens = None
        if is_constant(data):
            self._tokens = cached_tokens(tokenizing, data, cache)
        elif cache is not None and cache.is_given:
            raise ConfigError(
                f"{cache.file} has tokens of whole pictures; omit it, or data.crop and data.flip"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose crops, flips and captions come next."""
        self._data.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `condition`, and `tokens` (L,) or `image` (3, H, W) uint8."""
        row = self._data.caption_row(index) if self._is_text else index
        condition = self._conditions[row]
        if self._tokens is not None:
            return {"condition": condition, "tokens": self._tokens[index]}
        return {"condition": condition, "image": self._data[index]["image"]}


def class_ids(data: ImageDataset, num_classes: int) -> Tensor:
    """Return the class of every picture; ConfigError for pictures that have none.

    With one class the model is unconditional: all pictures belong to it, even without a class.
    """
    classes = [sample.class_id for sample in data.source.samples]
    if None in classes and num_classes > 1:
        has = "only captions" if data.source.has_captions else "neither classes nor captions"
        raise ConfigError(f"a class-conditional model needs class folders; this data has {has}")
    found = torch.tensor([number or 0 for number in classes])
    check_classes(found, num_classes)
    return found


def check_classes(class_ids: Tensor, num_classes: int) -> None:
    """Raise ConfigError for pictures of a class that the model does not have."""
    if int(class_ids.min()) < 0 or int(class_ids.max()) >= num_classes:
        raise ConfigError(
            f"the data has classes {int(class_ids.min())} to {int(class_ids.max())} (-1: none), "
            f"but the model has {num_classes} classes; set condition.num_classes"
        )


def cached_tokens(tokenizing: Tokenizing, data: ImageDataset, cache: TokenCache | None) -> Tensor:
    """Return the tokens (N, L) of all pictures, from the cache if it belongs to them.

    Raises ConfigError when a cache given by the user is missing or belongs to other pictures.
    """
    kept = cached(
        cache,
        lambda: tokenizing.key(data),
        lambda: _tensors(tokenizing, data),
        maker="tokenizer",
    )
    return kept["tokens"].long()


def write_tokens(tokenizing: Tokenizing, data: ImageDataset, file: Path) -> None:
    """Write the tokens of all pictures to a file, for `cached_tokens`."""
    if not is_constant(data):
        raise ConfigError("crops and flips change the tokens: only whole pictures can be cached")
    write_cache(file, tokenizing.key(data), lambda: _tensors(tokenizing, data))


def _tensors(tokenizing: Tokenizing, data: ImageDataset) -> dict[str, Tensor]:
    return {"tokens": tokenize(tokenizing, data).int()}


@torch.no_grad()
def tokenize(tokenizing: Tokenizing, data: ImageDataset) -> Tensor:
    """Return the tokens (N, L) int64 of all pictures."""
    device = next(tokenizing.module.parameters()).device
    rows = []
    for start in range(0, len(data), _BATCH):
        stop = min(start + _BATCH, len(data))
        image = torch.stack([data[index]["image"] for index in range(start, stop)])
        rows.append(tokenizing.tokens(to_model_range(image.to(device))).cpu())
    return torch.cat(rows)
