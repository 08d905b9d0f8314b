"""The golden vectors of a tiny INL-VAE and INL-DiT; README.md says how they were made."""

from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load_file

GOLDEN_DIR = Path(__file__).parent


@cache
def _all() -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = load_file(GOLDEN_DIR / "io.safetensors")
    return found


def golden(prefix: str = "") -> dict[str, NDArray[Any]]:
    """Return the arrays whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): each for name, each in _all().items() if name.startswith(prefix)
    }
