"""The GPU memory that an engine folder needs, computed from its manifest before loading."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nsp.artifacts.manifest import Variant
from nsp.errors import EngineError
from nsp.stage.io import Shape, Sizes, StageIO, array_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, without scratch memory, which is known only after loading."""

    weights: int  # the engines' files: weights, and kernels of a few MiB each
    buffers: int  # outputs of the stages in one loop at the largest batch, with the KV arena
    max_batch: int | None

    def __str__(self) -> str:
        """The plan in words."""
        return (
            f"GPU memory: weights {self.weights / 2**20:,.1f} MiB, KV arena and buffers up to "
            f"{self.buffers / 2**20:,.1f} MiB (batch {self.max_batch}), and the engines' scratch"
        )


def plan_memory(folder: Path, variants: Mapping[str, Variant]) -> MemoryPlan | None:
    """Return the plan for engines with profiles; None if sizes are free and memory grows.

    A loop runs every profile of every stage once, and its steps write into the arena. (If guidance
    ends early, half of the arena is copied in addition.) Raises EngineError for a missing file.
    """
    if not any(variant.profiles for variant in variants.values()):
        return None
    files = {next(iter(variant.files)) for variant in variants.values()}
    buffers = 0
    for variant in variants.values():
        io = variant.stage_io
        for profile in variant.profiles:
            largest = {name: tuple(bounds[2]) for name, bounds in profile.items()}
            buffers += _output_bytes(io, _sizes(io, largest))
    batches = [v.max_batch for v in variants.values() if v.max_batch is not None]
    try:
        weights = sum((folder / name).stat().st_size for name in files)
    except OSError as error:
        raise EngineError(f"{error.filename} is missing though the manifest lists it") from error
    return MemoryPlan(weights, buffers, min(batches, default=None))


def _sizes(io: StageIO, shapes: Mapping[str, Shape]) -> Sizes:
    """Return the sizes of the free axes."""
    pairs = ((io.inputs[name].words, shape) for name, shape in shapes.items())
    return {
        word: size
        for words, shape in pairs
        for word, size in zip(words, shape, strict=True)
        if word.isidentifier()
    }


def _output_bytes(io: StageIO, sizes: Sizes) -> int:
    return sum(array_bytes(s.shape(sizes), s.dtype) for s in io.outputs.values())
