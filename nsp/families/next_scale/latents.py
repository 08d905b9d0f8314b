"""The training pictures as latents of every scale: computed once, and kept in a file.

The frozen autoencoder computes them. The latent of scale k is that of the picture resized, with
antialiasing, to the size that the latent decodes to.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from nsp.data.dataset import ImageDataset, to_model_range
from nsp.errors import ConfigError
from nsp.families.next_scale.system import NextScaleSystem
from nsp.family.objective import TokenCache
from nsp.training.cache import cached, digest_of, is_constant, write_cache

_BATCH_PIXELS = 64 * 64 * 64  # encoded at once


class LatentDataset(Dataset[Mapping[str, object]]):
    """Prompts with latents, or with pictures if crops and flips change the latents."""

    def __init__(
        self,
        system: NextScaleSystem,
        data: ImageDataset,
        cache: TokenCache | None = None,
        *,
        held_out: bool = False,
    ) -> None:
        self._data, self._held_out = data, held_out
        self._conditions = system.encode_prompts(data.captions())
        self._latents: list[Tensor] | None = None
        if is_constant(data):
            self._latents = cached_latents(system, data, cache)
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
        """Return `condition`, `held_out`, and `latents` (one per scale) or `image` (3, H, W)."""
        condition = self._conditions[self._data.caption_row(index)]
        item = {"condition": condition, "held_out": self._held_out}
        if self._latents is None:
            return {**item, "image": self._data[index]["image"]}
        return {**item, "latents": [scale[index] for scale in self._latents]}


def resized(image_B3HW: Tensor, side_px: int) -> Tensor:
    """Return float pictures at another side, bilinear with antialiasing."""
    if image_B3HW.shape[-1] == side_px:
        return image_B3HW
    return F.interpolate(
        image_B3HW, (side_px, side_px), mode="bilinear", align_corners=False, antialias=True
    )


@torch.no_grad()
def encode_scales(system: NextScaleSystem, image_B3HW: Tensor) -> list[Tensor]:
    """Return the latents (B, C, s_k, s_k) of uint8 pictures at every scale."""
    pixels = system.config.vae.downsampling
    image = to_model_range(image_B3HW)
    # Also inside a training step: half types would give other latents than the cached ones, and
    # the values of SDXL's encoder are too large for float16.
    with torch.autocast(image.device.type, enabled=False):
        return [
            system.vae.encode(resized(image, side * pixels)).float() for side in system.config.sides
        ]


def cached_latents(
    system: NextScaleSystem, data: ImageDataset, cache: TokenCache | None
) -> list[Tensor]:
    """Return the latents (N, C, s_k, s_k) of all pictures, from the cache if it belongs to them.

    Raises ConfigError when a cache given by the user is missing or belongs to other pictures.
    """
    kept = cached(
        cache, lambda: _key(system, data), lambda: _tensors(system, data), maker="autoencoder"
    )
    return [kept[f"latent_{k}"] for k in range(system.config.num_scales)]


def write_latents(system: NextScaleSystem, data: ImageDataset, file: Path) -> None:
    """Write the latents of all pictures to a file, for `cached_latents`."""
    write_cache(file, _key(system, data), lambda: _tensors(system, data))


def _tensors(system: NextScaleSystem, data: ImageDataset) -> dict[str, Tensor]:
    return {f"latent_{k}": latent for k, latent in enumerate(encode_all(system, data))}


def _key(system: NextScaleSystem, data: ImageDataset) -> str:
    """Return the digest of what decides the latents: the encoder, the sides, the pictures."""
    about = (system.config.vae, system.config.sides, data.crop, data.image_size_px)
    return digest_of(
        about, system.vae, data, decides=lambda n: ".decoder." not in n and "post_quant" not in n
    )


def encode_all(system: NextScaleSystem, data: ImageDataset) -> list[Tensor]:
    """Return the latents (N, C, s_k, s_k) of all pictures, in float16: half the memory."""
    device = next(system.vae.parameters()).device
    size = max(1, _BATCH_PIXELS // system.config.image_size_px**2)
    scales: list[list[Tensor]] = [[] for _ in system.config.sides]
    for start in range(0, len(data), size):
        stop = min(start + size, len(data))
        image = torch.stack([data[index]["image"] for index in range(start, stop)])
        for kept, latent in zip(scales, encode_scales(system, image.to(device)), strict=True):
            kept.append(latent.half().cpu())
    return [torch.cat(kept).contiguous() for kept in scales]
