"""Writes picture files with metadata on their origin, and names them after their content.

The metadata are in a PNG's text chunks, and as JSON in the description (EXIF 0x010E) of the others.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nsp.files import write_file

Format: TypeAlias = Literal["png", "webp", "jpeg"]

_SLUG_BYTES = 60  # so that the whole name stays below the usual limit of 255
_DESCRIPTION = 0x010E
# WebP keeps every pixel, like PNG; JPEG does not.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "webp": {"lossless": True},
    "jpeg": {"quality": 95, "subsampling": 0},
}


def slug(text: str) -> str:
    """Return `text` as part of a file name: lower-case letters, digits (any script) and "-"."""
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    short = words.encode("utf-8", "ignore")[:_SLUG_BYTES].decode("utf-8", "ignore").rstrip("-")
    return short or "image"


def write_picture(
    path: Path, pixels_HW3: NDArray[np.uint8], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file of the kind that its suffix names, with `metadata`; a failure leaves no file."""
    write_image(path, Image.fromarray(pixels_HW3), metadata)


def write_image(path: Path, image: Image.Image, metadata: Mapping[str, str] | None = None) -> None:
    """Write a Pillow image, like `write_picture`."""
    kind = path.suffix.removeprefix(".")
    options = _text_chunks(metadata or {}) if kind == "png" else dict(_OPTIONS[kind])
    if kind != "png" and metadata:
        exif = Image.Exif()
        exif[_DESCRIPTION] = json.dumps(metadata)
        options["exif"] = exif
    with write_file(path) as partial:
        image.save(partial, format=kind.upper(), **options)


def _text_chunks(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return Pillow's option; text outside Latin-1 goes into international chunks, as it must."""
    text = PngInfo()
    for key, value in metadata.items():
        text.add_text(key, value)
    return {"pnginfo": text}


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file written by `write_picture`; empty if it has none.

    Raises OSError, and DataError for a file that is not a picture, or too large to be one.
    """
    from nsp.data.bounds import MAX_PICTURE_BYTES, read_regular

    return metadata_in(read_regular(path, most_bytes=MAX_PICTURE_BYTES))


def metadata_in(content: bytes) -> dict[str, str]:
    """Return the metadata in the bytes of a picture file, as `read_metadata`."""
    from nsp.data.pictures import read_text  # 3 ms that writing pictures need not spend

    chunks, description = read_text(content, _DESCRIPTION)
    if description is None:
        return chunks
    try:
        found = json.loads(description)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
