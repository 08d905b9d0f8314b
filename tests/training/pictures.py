"""Writes small captioned pictures."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, caption: str = "colour number") -> Path:
    """Write twelve pictures captioned "CAPTION INDEX" to `folder` and return it."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(12):
        pixels = np.full((16, 16, 3), rng.integers(0, 256, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"{caption} {index}")
    return folder
