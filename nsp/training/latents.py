"""The training pictures as continuous latents: computed once by the frozen autoencoder, and kept.

Axes: N pictures, B batch, C latent channels, h w a latent's grid.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nsp.data.dataset import ImageDataset
from nsp.errors import ConfigError
from nsp.family.objective import TokenCache
from nsp.training.cache import cached, digest_of, is_constant, write_cache
from nsp.training.text_states import TextStates

# The conditions of all captions: numbers (N, ...), or states kept in a file.
Conditions: TypeAlias = Tensor | TextStates

_BATCH_PIXELS = 64 * 64 * 64  # encoded at once


@dataclass(frozen=True)
class Encoding:
    """The part of a model that makes latents of pictures."""

    module: nn.Module  # whose weights decide the latents
    # Pictures (B, 3, H, W) uint8 -> their latents (B, C, h, w), of every scale.
    latents: Callable[[Tensor], Sequence[Tensor]]
    about: tuple[object, ...]  # settings that decide the latents
    decides: Callable[[str], bool]  # whether the weight of this name does

    def key(self, data: ImageDataset) -> str:
        """Return the digest of what decides the latents of these pictures."""
        about = (*self.about, data.crop, data.image_size_px)
        return digest_of(about, self.module, data, decides=self.decides)


class LatentDataset(Dataset[Mapping[str, object]]):
    """Conditions with latents, or with pictures if crops and flips change the latents."""

    def __init__(
        self,
        data: ImageDataset,
        encoding: Encoding,
        conditions_N: Conditions,
        cache: TokenCache | None = None,
        *,
        held_out: bool = False,
    ) -> None:
        """Take the condition of every caption of the data, in the order of its captions()."""
        self._data, self._held_out, self._conditions = data, held_out, conditions_N
        self._latents: list[Tensor] | None = None
        if is_constant(data):
            self._latents = cached_latents(encoding, data, cache)
        elif cache is not None and cache.is_given:
            raise ConfigError(
                f"{cache.file} has latents of whole pictures; omit it, or data.crop and data.flip"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose crops, flips and captions come next."""
        self._data.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, object]:
        """Return `condition`, `held_out`, and `latents` or `image` (3, H, W)."""
        condition = self._conditions[self._data.caption_row(index)]
        item = {"condition": condition, "held_out": self._held_out}
        if self._latents is None:
            return {**item, "image": self._data[index]["image"]}
        return {**item, "latents": [each[index] for each in self._latents]}


def cached_latents(
    encoding: Encoding, data: ImageDataset, cache: TokenCache | None
) -> list[Tensor]:
    """Return the latents (N, C, h, w) of all pictures, from the cache if it belongs to them.

    Raises ConfigError when a cache given by the user is missing or belongs to other pictures.
    """
    kept = cached(
        cache, lambda: encoding.key(data), lambda: _tensors(encoding, data), maker="autoencoder"
    )
    return [kept[f"latent_{k}"] for k in range(len(kept))]


def write_latents(encoding: Encoding, data: ImageDataset, file: Path) -> None:
    """Write the latents of all pictures to a file, for `cached_latents`."""
    if not is_constant(data):
        raise ConfigError("crops and flips change the latents: only whole pictures can be cached")
    write_cache(file, encoding.key(data), lambda: _tensors(encoding, data))


def _tensors(encoding: Encoding, data: ImageDataset) -> dict[str, Tensor]:
    return {f"latent_{k}": latent for k, latent in enumerate(encode_all(encoding, data))}


@torch.no_grad()
def encode_all(encoding: Encoding, data: ImageDataset) -> list[Tensor]:
    """Return the latents (N, C, h, w) of all pictures, in float16: half the memory."""
    device = next(encoding.module.parameters()).device
    size = max(1, _BATCH_PIXELS // data.image_size_px**2)
    parts: list[Sequence[Tensor]] = []
    for start in range(0, len(data), size):
        stop = min(start + size, len(data))
        image = torch.stack([data[index]["image"] for index in range(start, stop)])
        parts.append([each.half().cpu() for each in encoding.latents(image.to(device))])
    return [torch.cat(each).contiguous() for each in zip(*parts, strict=True)]
