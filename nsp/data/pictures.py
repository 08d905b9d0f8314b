"""Decodes the bytes of any picture file into 8-bit RGB, or says why they cannot be used."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nsp.errors import DataError

PICTURE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff"}
    | {".webp"}
)


def decode_rgb(content: bytes) -> Image.Image:
    """Return the whole picture as RGB, upright (EXIF orientation), transparency on white.

    Of an animation, the first frame. 16-bit greyscale keeps its high byte. Raises DataError with
    the bare reason (no file name) when the bytes are empty, truncated or not a picture.
    """
    if not content:
        raise DataError("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            return _to_rgb(opened)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError("not a picture Pillow can read") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise a dozen types (struct, zlib, ...) on damaged bytes
        raise DataError(f"{type(error).__name__}: {error}") from error


def _to_rgb(opened: Image.Image) -> Image.Image:
    is_16_bit = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PNG")
    image = ImageOps.exif_transpose(opened)
    if is_16_bit:
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):  # Pillow would clip these at 255 without a word
        raise DataError(f"pixel mode {image.mode} has no fixed white; convert it to 8 or 16 bit")
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, "white")
        return Image.alpha_composite(white, pixels).convert("RGB")
    return image.convert("RGB")
