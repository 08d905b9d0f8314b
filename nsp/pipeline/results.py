"""The results of a pipeline: images, traces of all steps, and the state after a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nsp import values
from nsp.errors import ConfigError
from nsp.family.contract import AnyFamily
from nsp.family.order import Step
from nsp.files import name_failed_write
from nsp.stage.arena import Array

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image


class Decoder(Protocol):
    """What a step needs to become a picture: the model that made it."""

    family: AnyFamily

    def decode(self, latent: Array, *, clipped: bool = True) -> NDArray[np.float32]:
        """Return the picture (B, 3, H, W) in [0, 1] of a latent on the backend."""

    def download(self, array: Any) -> NDArray[Any]:
        """Return a NumPy copy of an array of the backend."""


@dataclass(frozen=True)
class Trace:
    """The results of all steps, one entry per step; families without tokens have none here."""

    tokens: list[NDArray[np.int64]]  # (B, L_s) sampled
    logits: list[NDArray[np.float32]]  # (B, L_s, V) guided, before temperature and filters
    latents: list[NDArray[np.float32]]  # (B, C, h, w) after the step
    image: NDArray[np.float32]  # (B, 3, H, W) in [0, 1]


@dataclass(frozen=True)
class GenerateResult:
    """Images of one `Pipeline.generate`."""

    images: NDArray[np.uint8]  # (B, H, W, 3)
    seed: int  # the seed of the first image
    prompts: tuple[str, ...] = ()
    class_ids: tuple[int, ...] = ()
    trace: Trace | None = None
    seeds: tuple[int, ...] = ()  # the seed of every image, enough to make it again


@dataclass(frozen=True, repr=False)
class PipelineOutput:
    """Images of one call of a pipeline."""

    images: "list[Image] | NDArray[np.uint8] | NDArray[np.float32]"  # by `output_type`
    seeds: tuple[int, ...]  # the seed of every image, enough to make it again

    def __repr__(self) -> str:
        """Return a description without the pixels."""
        return f"PipelineOutput({len(self.images)} images, seeds={list(self.seeds)})"

    def save(self, path: "str | Path") -> None:
        """Write the picture to a file; several to files with numbers: "out_0.png", "out_1.png".

        Raises ConfigError for images that are not pictures (`output_type`) and for an ending that
        is no format, OSError if the file cannot be written.
        """
        if not isinstance(self.images, list):
            raise ConfigError('only pictures can be saved; use output_type="pil"')
        whole, several = values.path("path", path), len(self.images) > 1
        for number, picture in enumerate(self.images):
            place = whole.with_stem(f"{whole.stem}_{number}") if several else whole
            try:
                with name_failed_write(place):
                    picture.save(place)
            except ValueError as error:  # of a name whose ending is no format
                raise ConfigError(f"{place} cannot be saved ({error}); use .png") from error

    def _repr_png_(self) -> bytes | None:
        """Return all pictures side by side, for notebooks; None for latents."""
        from nsp.data.sheet import side_by_side

        return side_by_side(self.images)


@dataclass(frozen=True)
class StreamStep:
    """State after one step; `decode` turns its latent into pictures."""

    scale: int  # number of the step
    num_scales: int  # steps of the whole loop
    _pipeline: Decoder = field(repr=False)
    _step: Step = field(repr=False)

    @property
    def has_tokens(self) -> bool:
        """Whether the step drew tokens from a codebook."""
        return "tokens" in self._step.drawn

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Sampled tokens (B, L_s); ConfigError for a family that draws no tokens."""
        return self.result("tokens")

    @property
    def logits(self) -> NDArray[np.float32]:
        """Guided logits (B, L_s, V); ConfigError for a family that draws no tokens."""
        return self.result("logits")

    @property
    def latent(self) -> NDArray[np.float32]:
        """The latent so far, (B, C, h, w)."""
        return self._pipeline.download(self._whole())

    def decode(self, *, clipped: bool = True) -> NDArray[np.float32]:
        """Return the picture of the latent so far, (B, 3, H, W) in [0, 1].

        Not `clipped`, values may lie a little outside, if the model's decoder does not clip.
        """
        return self._pipeline.decode(self._whole(), clipped=clipped)

    def result(self, name: str) -> NDArray[Any]:
        """Return a further result of the step, images first, under its family's name for it.

        Raises ConfigError for one that the step does not have, naming those that it has.
        """
        if name not in self._step.drawn:
            others = [f'result("{each}")' for each in self._step.drawn]
            raise ConfigError(
                f"family {self._pipeline.family.name} has no {name} in this step; use "
                f"{' or '.join(['`latent`', *others])}"
            )
        return joined(self._pipeline.download, self._step.drawn[name])

    def _whole(self) -> Any:
        """Return the latent on the backend."""
        if self._step.latent is None:
            raise ConfigError(
                f"step {self.scale} is in the middle of a picture: there is no latent yet"
            )
        return self._step.latent


def joined(download: Callable[[Array], NDArray[Any]], parts: Sequence[Array]) -> NDArray[Any]:
    """Return on the host what a step has drawn, (B, L, ...), from its parts along L."""
    return np.concatenate([download(part) for part in parts], axis=1)


def to_uint8(image_B3HW: NDArray[np.float32], *, size_px: int | None = None) -> NDArray[np.uint8]:
    """Return (B, H, W, 3) uint8 pixels of an image in [0, 1], rounded to nearest.

    With `size_px` they are resized to that side before they are clipped and rounded.
    """
    if size_px is not None and image_B3HW.shape[2:] != (size_px, size_px):
        from nsp.pipeline.bicubic import resize_bicubic  # few pictures pass here

        image_B3HW = resize_bicubic(image_B3HW, size_px)
    pixels = np.rint(np.clip(image_B3HW, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
