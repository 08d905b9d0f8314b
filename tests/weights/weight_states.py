"""State dicts as people have them, made from the goldens for tests."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.goldens.var_tiny.fixtures import GOLDEN_DIR

VAE = GOLDEN_DIR / "weights_vae.safetensors"
VAR = GOLDEN_DIR / "weights_var.safetensors"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 1236544000\n"


def predictor_state() -> dict[str, Tensor]:
    """Return the golden predictor under its published names."""
    return dict(load_file(VAR))


def prefixed(prefix: str) -> dict[str, Tensor]:
    """Return the golden predictor with a prefix before every name."""
    return {prefix + name: tensor for name, tensor in predictor_state().items()}


def saved(content: object, path: Path) -> Path:
    """Write an object with torch.save and return its file."""
    torch.save(content, path)
    return path
