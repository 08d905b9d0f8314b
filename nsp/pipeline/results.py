"""What a pipeline gives back: images, what happened on the way, and the state after a scale."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nsp.errors import ConfigError
from nsp.family.contract import AnyFamily
from nsp.stage.arena import Array


class Source(Protocol):
    """The pipeline of a step, which turns what lies on its device into arrays."""

    family: AnyFamily

    def download(self, array: Array) -> NDArray[Any]:
        """Return a NumPy copy."""

    def decode(self, latent: Array) -> NDArray[np.float32]:
        """Return the picture (B, 3, H, W) in [0, 1] of a latent."""


@dataclass(frozen=True)
class Trace:
    """What happened on the way: one entry per scale; no tokens of families that draw none."""

    tokens: list[NDArray[np.int64]]  # (B, L_s) sampled
    logits: list[NDArray[np.float32]]  # (B, L_s, V) guided, before temperature and filters
    latents: list[NDArray[np.float32]]  # (B, C, h, w) after the scale
    image: NDArray[np.float32]  # (B, 3, H, W) in [0, 1]


@dataclass(frozen=True)
class GenerateResult:
    """Images of one call."""

    images: NDArray[np.uint8]  # (B, H, W, 3)
    seed: int
    prompts: tuple[str, ...] = ()
    class_ids: tuple[int, ...] = ()
    trace: Trace | None = None


@dataclass(frozen=True)
class StreamStep:
    """State after one scale step; `decode` turns its latent into pictures."""

    scale: int
    num_scales: int
    _tokens: NDArray[np.int64] | None
    _pipeline: Source = field(repr=False)
    _step: Any = field(repr=False)

    @property
    def has_tokens(self) -> bool:
        """Whether the scale was drawn as tokens from a codebook."""
        return self._tokens is not None

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Sampled tokens (B, L_s); ConfigError for a family that draws none."""
        if self._tokens is None:
            raise ConfigError(f"family {self._pipeline.family.name} draws no tokens; see `latent`")
        return self._tokens

    @property
    def latent(self) -> NDArray[np.float32]:
        """The latent so far, (B, C, h, w)."""
        return self._pipeline.download(self._step.latent)

    @property
    def logits(self) -> NDArray[np.float32]:
        """Guided logits (B, L_s, V)."""
        return self._pipeline.download(self._step.guided)

    def decode(self) -> NDArray[np.float32]:
        """Return the picture of the latent so far, (B, 3, H, W) in [0, 1]."""
        return self._pipeline.decode(self._step.latent)


def to_uint8(image_B3HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return (B, H, W, 3) uint8 pixels of an image in [0, 1], rounded to nearest."""
    pixels = np.rint(np.clip(image_B3HW, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
