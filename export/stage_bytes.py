"""The sizes of a checkpoint's stages, from the headers of its weight files."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from nsp.export.graph.dtypes import matches
from nsp.family.contract import Stage
from nsp.weights.weight_files import read_shapes

_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 4}  # int8: weights not quantized


def stage_bytes(checkpoint: Path, stages: Mapping[str, Stage], precision: str) -> dict[str, int]:
    """Return the number of bytes of every stage's weights in a precision.

    Raises CheckpointError for an unreadable weight file.
    """
    sizes = dict(_parameters(checkpoint))
    result = {}
    for stage, declared in stages.items():
        half = sum(n for name, n in sizes.items() if matches(name, declared.half))
        full = sum(n for name, n in sizes.items() if matches(name, declared.full))
        result[stage] = half * _ITEM_BYTES[precision] + full * _ITEM_BYTES["fp32"]
        if precision == "int8":
            bytes_saved = _ITEM_BYTES["int8"] - 1
            result[stage] -= bytes_saved * sum(
                n for name, n in sizes.items() if matches(name, declared.int8)
            )
    return result


def _parameters(checkpoint: Path) -> Iterator[tuple[str, int]]:
    """Yield (name in the family's system, number of elements); a part's folder leads the name."""
    for path in sorted(checkpoint.glob("*/*.safetensors")):
        for name, shape in read_shapes(path).items():
            yield f"{path.parent.name}.{name}", math.prod(shape)
