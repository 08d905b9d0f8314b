"""The training pictures as latents of every scale: made once by the frozen autoencoder, in a file.

The latent of scale k is that of the picture resized, with antialiasing, to what it decodes to.
"""

import hashlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from nsp.data.dataset import ImageDataset, to_model_range
from nsp.errors import ConfigError, DataError
from nsp.families.next_scale.system import NextScaleSystem
from nsp.files import write_file
from nsp.training.objective import TokenCache

logger = logging.getLogger(__name__)

_BATCH_PIXELS = 64 * 64 * 64  # encoded at once


class LatentDataset(Dataset[Mapping[str, Any]]):
    """Prompts with latents, or with pictures where crops and flips change the latents."""

    def __init__(
        self,
        system: NextScaleSystem,
        data: ImageDataset,
        cache: TokenCache | None = None,
        *,
        held_out: bool = False,
    ) -> None:
        self._data, self._held_out = data, held_out
        captions = [sample.caption for sample in data.source.samples]
        self._conditions = system.encode_prompts(captions)
        self._latents: list[Tensor] | None = None
        if is_constant(data):
            self._latents = cached_latents(system, data, cache)
        elif cache is not None and cache.is_given:
            raise ConfigError(
                f"{cache.file} holds latents of whole pictures; leave it out, or data.crop and "
                "data.flip"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose crops and flips come next."""
        self._data.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `condition`, `held_out`, and `latents` (one per scale) or `image` (3, H, W)."""
        item = {"condition": self._conditions[index], "held_out": self._held_out}
        if self._latents is None:
            return {**item, "image": self._data[index]["image"]}
        return {**item, "latents": [scale[index] for scale in self._latents]}


def is_constant(data: ImageDataset) -> bool:
    """Return whether every epoch shows the same pictures."""
    return not (data.train and (data.crop or data.flip))


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
    return [
        system.vae.encode(resized(image, side * pixels)).float() for side in system.config.sides
    ]


def cached_latents(
    system: NextScaleSystem, data: ImageDataset, cache: TokenCache | None
) -> list[Tensor]:
    """Return the latents (N, C, s_k, s_k) of all pictures, from the cache where it is of these.

    Raises ConfigError when one that the user gave is missing or of something else.
    """
    if cache is None:
        return encode_all(system, data)
    exists = cache.file.exists()
    if exists and _key_of(cache.file) == cache_key(system, data):
        kept = load_file(cache.file)
        return [kept[f"latent_{k}"] for k in range(system.config.num_scales)]
    if cache.is_given:
        problem = "is of another autoencoder or other pictures" if exists else "does not exist"
        raise ConfigError(
            f"{cache.file} {problem}; make it with nsp data cache, or leave data.token_cache out"
        )
    if exists:
        logger.warning("%s is of another autoencoder or other pictures; made again", cache.file)
    return write_cache(system, data, cache.file)


def write_cache(system: NextScaleSystem, data: ImageDataset, cache: Path) -> list[Tensor]:
    """Encode all pictures into a safetensors file and return the latents of every scale."""
    started = time.monotonic()
    latents = encode_all(system, data)
    tensors = {f"latent_{k}": latent for k, latent in enumerate(latents)}
    with write_file(cache) as partial:
        save_file(tensors, partial, metadata={"key": cache_key(system, data)})
    logger.info(
        "%s: %d pictures as latents of %d scales, %.0f s",
        *(cache, len(data), len(latents), time.monotonic() - started),
    )
    return latents


def _key_of(cache: Path) -> str | None:
    """Return the key a cache was made with; DataError when it is damaged."""
    try:
        with safe_open(cache, framework="pt") as file:
            return (file.metadata() or {}).get("key")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{cache} is damaged ({error}); delete it to make it again") from error


def cache_key(system: NextScaleSystem, data: ImageDataset) -> str:
    """Return the SHA-256 of what decides the latents: encoder, sides, the bytes of pictures."""
    about = (system.config.vae, system.config.sides, data.crop, data.image_size_px)
    digest = hashlib.sha256(repr(about).encode())
    for name, tensor in sorted(system.vae.state_dict().items()):
        if ".decoder." not in name and "post_quant" not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for index in range(len(data)):
        digest.update(data.source.files[index].read())
    return digest.hexdigest()


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
