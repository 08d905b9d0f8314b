"""Writes PNG files with metadata on their origin, and names them after their content."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nsp.files import write_file

_SLUG_BYTES = 60  # so that the whole name stays below the usual limit of 255


def slug(text: str) -> str:
    """Return `text` as part of a file name: lower-case letters, digits (any script) and "-"."""
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    short = words.encode("utf-8", "ignore")[:_SLUG_BYTES].decode("utf-8", "ignore").rstrip("-")
    return short or "image"


def write_png(
    path: Path, pixels_HW3: NDArray[np.uint8], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a PNG with `metadata` in its text chunks; if that fails, no file is left.

    Text outside Latin-1 goes into international text chunks, as the format requires.
    """
    write_image(path, Image.fromarray(pixels_HW3), metadata)


def write_image(path: Path, image: Image.Image, metadata: Mapping[str, str] | None = None) -> None:
    """Write a Pillow image, like `write_png`."""
    text = PngInfo()
    for key, value in (metadata or {}).items():
        text.add_text(key, value)
    with write_file(path) as partial:
        image.save(partial, format="PNG", pnginfo=text)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG."""
    from nsp.data.pictures import read_text_chunks  # 3 ms that writing pictures need not spend

    return read_text_chunks(path)
