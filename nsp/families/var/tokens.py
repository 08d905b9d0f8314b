"""The training pictures as tokens: made once by the frozen tokenizer, kept in a file."""

import hashlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from nsp.data.dataset import ImageDataset, to_model_range
from nsp.errors import ConfigError, DataError
from nsp.families.var.system import VarSystem
from nsp.families.var.vqvae import VQVAE
from nsp.files import write_file
from nsp.training.objective import TokenCache

logger = logging.getLogger(__name__)

_BATCH = 64  # pictures tokenized at once


class TokenDataset(Dataset[Mapping[str, Any]]):
    """Conditions with tokens, or with pictures where crops and flips change the tokens.

    Tokens that a picture always gives are made once; `cache` is the file that keeps them.
    """

    def __init__(
        self, system: VarSystem, data: ImageDataset, cache: TokenCache | None = None
    ) -> None:
        self._data = data
        if system.config.text is None:
            classes = [sample.class_id for sample in data.source.samples]
            if None in classes:
                raise ConfigError(
                    "a class-conditional model needs class folders; this data has only captions"
                )
            self._conditions = torch.tensor(classes)
            check_classes(self._conditions, system.config.num_classes)
        else:
            captions = [sample.caption for sample in data.source.samples]
            self._conditions = system.encode_prompts(captions)
        self._tokens = None
        if is_constant(data):
            self._tokens = cached_tokens(system.vae, data, cache)
        elif cache is not None and cache.is_given:
            raise ConfigError(
                f"{cache.file} holds tokens of whole pictures; leave it out, or data.crop and "
                "data.flip"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose crops and flips come next."""
        self._data.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `condition`, and `tokens` (L,) or `image` (3, H, W) uint8."""
        condition = self._conditions[index]
        if self._tokens is not None:
            return {"condition": condition, "tokens": self._tokens[index]}
        return {"condition": condition, "image": self._data[index]["image"]}


def is_constant(data: ImageDataset) -> bool:
    """Return whether every epoch shows the same pictures."""
    return not (data.train and (data.crop or data.flip))


def check_classes(class_ids: Tensor, num_classes: int) -> None:
    """Raise ConfigError for pictures of a class the model has not."""
    if int(class_ids.min()) < 0 or int(class_ids.max()) >= num_classes:
        raise ConfigError(
            f"the data has classes {int(class_ids.min())} to {int(class_ids.max())} (-1: none), "
            f"the model {num_classes}; set condition.num_classes"
        )


def cached_tokens(vae: VQVAE, data: ImageDataset, cache: TokenCache | None) -> Tensor:
    """Return the tokens (N, L) of all pictures, from the cache where it is of these.

    Raises ConfigError when one that the user gave is missing or of something else.
    """
    if cache is None:
        return tokenize(vae, data)
    exists = cache.file.exists()
    if exists and _key_of(cache.file) == cache_key(vae, data):
        with safe_open(cache.file, framework="pt") as file:
            tokens: Tensor = file.get_tensor("tokens")
        return tokens.long()
    if cache.is_given:
        problem = "is of another tokenizer or other pictures" if exists else "does not exist"
        raise ConfigError(
            f"{cache.file} {problem}; make it with nsp data cache, or leave data.token_cache out"
        )
    if exists:
        logger.warning("%s is of another tokenizer or other pictures; made again", cache.file)
    return write_cache(vae, data, cache.file)


def write_cache(vae: VQVAE, data: ImageDataset, cache: Path) -> Tensor:
    """Tokenize all pictures into a safetensors file and return the tokens (N, L)."""
    started = time.monotonic()
    tokens = tokenize(vae, data)
    with write_file(cache) as partial:
        save_file({"tokens": tokens.int()}, partial, metadata={"key": cache_key(vae, data)})
    logger.info(
        "%s: %d pictures as %d tokens each, %.0f s",
        *(cache, *tokens.shape, time.monotonic() - started),
    )
    return tokens


def _key_of(cache: Path) -> str | None:
    """Return the key a cache was made with; DataError when it is damaged."""
    try:
        with safe_open(cache, framework="pt") as file:
            return (file.metadata() or {}).get("key")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{cache} is damaged ({error}); delete it to make it again") from error


def cache_key(vae: VQVAE, data: ImageDataset) -> str:
    """Return the SHA-256 of what decides the tokens: weights, schedule, the bytes of pictures."""
    digest = hashlib.sha256(repr((vae.config, vae.quantize.patch_nums, data.crop)).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name != "quantize.ema_vocab_hit_SV":  # a statistic
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for index in range(len(data)):
        digest.update(data.source.files[index].read())
    return digest.hexdigest()


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
