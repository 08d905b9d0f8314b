"""Which dtype each weight of a stage has in an export; no torch."""

import fnmatch
from collections.abc import Sequence

from nsp.artifacts.manifest import PRECISION_DTYPES
from nsp.family.stage_weights import StageWeights


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a parameter's name fits one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def precision_map(weights: StageWeights, precision: str) -> dict[str, str]:
    """Return the dtype of every pattern of one stage, for the manifest."""
    full = dict.fromkeys(weights.full, "float32")
    narrow = dict.fromkeys(weights.half, PRECISION_DTYPES[precision])
    if precision == "int8":
        narrow |= dict.fromkeys(weights.int8, "int8")
    return {**narrow, **full}


def stored_precision(weights: StageWeights, precision: str) -> str:
    """Return the precision a stage really has: fp32 where no weight takes the one asked for."""
    narrow = weights.int8 if precision == "int8" else weights.half
    return precision if narrow else "fp32"
