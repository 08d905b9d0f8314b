"""The dtype of each weight of a stage in an export; without torch."""

from nsp.artifacts.manifest import PRECISION_DTYPES
from nsp.family.contract import Stage


def precision_map(stage: Stage, precision: str) -> dict[str, str]:
    """Return the dtype of every pattern of one stage, for the manifest."""
    full = dict.fromkeys(stage.full, "float32")
    narrow = dict.fromkeys(stage.half, PRECISION_DTYPES[precision])
    if precision == "int8":
        narrow |= dict.fromkeys(stage.int8, "int8")
    return {**narrow, **full}


def stored_precision(stage: Stage, precision: str) -> str:
    """Return the precision that a stage really has: fp32 if the requested one changes no weight."""
    narrow = stage.int8 if precision == "int8" else stage.half
    return precision if narrow else "fp32"
