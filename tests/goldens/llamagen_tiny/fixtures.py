"""Reads the fixtures in this folder; README.md here says how they were made."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN_DIR = Path(__file__).parent


@cache
def tensors(name: str = "io") -> dict[str, Tensor]:
    """Return the tensors of a file."""
    return load_file(GOLDEN_DIR / f"{name}.safetensors")


@cache
def config() -> dict[str, Any]:
    """Return the constructor arguments of all models."""
    found: dict[str, Any] = json.loads((GOLDEN_DIR / "config.json").read_text())
    return found


def arguments(gpt: str = "gpt", **vq: Any) -> dict[str, Any]:
    """Return what `nsp convert --config` takes for one of the transformers."""
    return {"vq": {**config()["vq"], **vq}, "gpt": config()[gpt], "grid": config()["grid"]}


def weights(name: str) -> Path:
    """Return the file of one model's weights."""
    return GOLDEN_DIR / f"weights_{name}.safetensors"
