"""The training pictures as tokens: made once by the frozen tokenizer, kept in a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nsp.data.dataset import ImageDataset, to_model_range
from nsp.errors import ConfigError
from nsp.families.var.system import VarSystem
from nsp.families.var.vqvae import VQVAE
from nsp.family.objective import TokenCache
from nsp.training.cache import cached, digest_of, is_constant, write_cache

_BATCH = 64  # pictures tokenized at once


class TokenDataset(Dataset[Mapping[str, object]]):
    """Conditions with tokens, or with pictures if crops and flips change the tokens.

    Without crops and flips, tokens are computed once; `cache` is the file that keeps them.
    """

    def __init__(
        self, system: VarSystem, data: ImageDataset, cache: TokenCache | None = None
    ) -> None:
        self._data = data
        if system.config.text is None:
            classes = [sample.class_id for sample in data.source.samples]
            if None in classes and system.config.num_classes > 1:
                has = (
                    "only captions" if data.source.has_captions else "neither classes nor captions"
                )
                raise ConfigError(
                    f"a class-conditional model needs class folders; this data has {has}"
                )
            # With one class the model is unconditional: all pictures belong to it, even without a
            # class.
            self._conditions = torch.tensor([number or 0 for number in classes])
            check_classes(self._conditions, system.config.num_classes)
        else:
            self._conditions = system.encode_prompts(data.captions())
        self._is_text = system.config.text is not None
        self._tokens = None
        if is_constant(data):
            self._tokens = cached_tokens(system.vae, data, cache)
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


def check_classes(class_ids: Tensor, num_classes: int) -> None:
    """Raise ConfigError for pictures of a class that the model does not have."""
    if int(class_ids.min()) < 0 or int(class_ids.max()) >= num_classes:
        raise ConfigError(
            f"the data has classes {int(class_ids.min())} to {int(class_ids.max())} (-1: none), "
            f"but the model has {num_classes} classes; set condition.num_classes"
        )


def cached_tokens(vae: VQVAE, data: ImageDataset, cache: TokenCache | None) -> Tensor:
    """Return the tokens (N, L) of all pictures, from the cache if it belongs to them.

    Raises ConfigError when a cache given by the user is missing or belongs to other pictures.
    """
    kept = cached(cache, lambda: _key(vae, data), lambda: _tensors(vae, data), maker="tokenizer")
    return kept["tokens"].long()


def write_tokens(vae: VQVAE, data: ImageDataset, file: Path) -> None:
    """Write the tokens of all pictures to a file, for `cached_tokens`."""
    write_cache(file, _key(vae, data), lambda: _tensors(vae, data))


def _tensors(vae: VQVAE, data: ImageDataset) -> dict[str, Tensor]:
    return {"tokens": tokenize(vae, data).int()}


def _key(vae: VQVAE, data: ImageDataset) -> str:
    """Return the digest of all that decides tokens: no usage statistic, and no decoder."""
    about = (vae.config, vae.quantize.patch_nums, data.crop)
    others = ("quantize.ema_vocab_hit_SV", "decoder.", "post_quant_conv.")
    return digest_of(about, vae, data, decides=lambda name: not name.startswith(others))


@torch.no_grad()
def tokenize(vae: VQVAE, data: ImageDataset) -> Tensor:
    """Return the tokens (N, L) int64 of all pictures."""
    device = next(vae.parameters()).device
    rows = []
    for start in range(0, len(data), _BATCH):
        stop = min(start + _BATCH, len(data))
        image = torch.stack([data[index]["image"] for index in range(start, stop)])
        rows.append(torch.cat(vae.tokenize(to_model_range(image.to(device))), 1).cpu())
    return torch.cat(rows)
