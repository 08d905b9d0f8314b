"""The sizes of a checkpoint's stages, from the headers of its weight files."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from nsp.artifacts.weight_kinds import count_weights
from nsp.family.contract import Stage
from nsp.stage.io import Shape
from nsp.weights.weight_files import read_shapes


def stage_bytes(checkpoint: Path, stages: Mapping[str, Stage], precision: str) -> dict[str, int]:
    """Return the number of bytes of every stage's weights in a precision.

    Raises CheckpointError for an unreadable weight file.
    """
    shapes = dict(_shapes(checkpoint))
    return {
        name: count_weights(stage, shapes).num_bytes(precision) for name, stage in stages.items()
    }


def _shapes(checkpoint: Path) -> Iterator[tuple[str, Shape]]:
    """Yield (name in the family's system, shape); a part's folder leads the name."""
    for path in sorted(checkpoint.glob("*/*.safetensors")):
        for name, shape in read_shapes(path).items():
            yield f"{path.parent.name}.{name}", tuple(shape)
