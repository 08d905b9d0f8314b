"""How many weights a stage has of each kind, and their bytes in an export; no torch."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nsp.config import Config
from nsp.family.contract import Stage
from nsp.stage.io import Shape

# Bytes of one weight of each kind in an export of each precision.
_ITEM_BYTES: Mapping[str, Mapping[str, int]] = {
    "fp32": {"half": 4, "int8": 4, "full": 4},
    "fp16": {"half": 2, "int8": 2, "full": 4},
    "bf16": {"half": 2, "int8": 2, "full": 4},
    "int8": {"half": 4, "int8": 1, "full": 4},
}


@dataclass(frozen=True, kw_only=True)
class WeightCounts(Config):
    """Numbers of weights by what an export may make of them; each weight counts once."""

    half: int = 0  # narrow in fp16 and bf16, float32 in int8
    int8: int = 0  # narrow in fp16 and bf16, 8 bits in int8
    full: int = 0  # always float32

    def num_bytes(self, precision: str) -> int:
        """Return their bytes in an export of this precision."""
        sizes = _ITEM_BYTES[precision]
        return sum(size * int(getattr(self, kind)) for kind, size in sizes.items())


def count_weights(stage: Stage, shapes: Mapping[str, Shape]) -> WeightCounts:
    """Return the weights of a stage among those of `shapes`: name in the family's system -> shape.

    Weights that the stage does not declare are not counted.
    """
    counts = {"half": 0, "int8": 0, "full": 0}
    for name, shape in shapes.items():
        if matches(name, stage.half):
            counts["int8" if matches(name, stage.int8) else "half"] += math.prod(shape)
        elif matches(name, stage.full):
            counts["full"] += math.prod(shape)
    return WeightCounts(**counts)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a parameter's name fits one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
