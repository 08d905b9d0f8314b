"""Decodes the bytes of any picture file into 8-bit RGB, or says why they cannot be used.

Only this module of nsp opens pictures. Its limits do not depend on the settings of the decoding
library: at most MAX_PIXELS are read, and decoding takes at most MEMORY_BYTES, for one picture and
for all that are decoded at the same time (see bounds.py). A decoder's own messages about damage go
to our log at debug level; users read our messages.
"""

import ctypes
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError, _imaging

from nsp.data.bounds import MAX_PICTURE_BYTES, MEMORY_BYTES, ByteBudget, check_size
from nsp.errors import DataError
from nsp.sniff import sniff_bytes

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff"}
    | {".webp"}
)
MAX_PIXELS = 178_956_970  # Pillow's default limit
_MEMORY = ByteBudget(MEMORY_BYTES)
_SMALL_FILE = 16 << 20  # bytes; any number of threads may read files up to this size at once
# Bytes per pixel that a decoder needs besides its result, and those that it keeps afterwards.
_DECODER_BYTES = {
    "AVIF": (10, 6),
    "JPEG": (8, 0),  # progressive CMYK
    "JPEG2000": (22, 18),
    "MPO": (8, 0),
    "WEBP": (12, 8),
}
_STRIP_PIXELS = 1 << 20  # pixels of a transparent picture that are put on white at once
_NARROW_MODES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
_WITH_ALPHA = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})


class PictureFile(Protocol):
    """The place of one picture's bytes; safe to read from any thread and to pickle."""

    @property
    def path(self) -> Path:
        """The file to repair when the picture is damaged."""

    def size(self) -> int:
        """Return its number of bytes, if that is known before reading; raises OSError."""

    def read(self) -> bytes:
        """Return the bytes; raises OSError, or DataError with only the reason."""


def decode_rgb(content: bytes) -> Image.Image:
    """Return the whole picture as RGB, upright (EXIF orientation), transparency on white.

    An animation gives its first frame. 16-bit greyscale keeps its high byte. Raises DataError with
    only the reason (no file name) when the bytes are empty, truncated, not a picture or too large.
    """
    with _decoding():
        picture = _opened(content)
        with _MEMORY.hold(_memory_of(picture)):
            return _to_rgb(picture)


@contextmanager
def picture_in_memory(file: PictureFile) -> Iterator[tuple[bytes, Image.Image]]:
    """Yield the bytes of a file and its picture as `decode_rgb` makes it, for use in threads.

    The memory of both is counted until the block ends. Raises as `decode_rgb`, and OSError.
    """
    num_bytes = file.size()
    check_size(num_bytes, MAX_PICTURE_BYTES)
    if num_bytes > _SMALL_FILE:  # its header is not known yet, so it is read alone
        with _MEMORY.hold(_MEMORY.num_bytes):
            content = file.read()
            with _decoding():
                rgb = _to_rgb(_opened(content))
            yield content, rgb
        return
    content = file.read()
    with _decoding():
        picture = _opened(content)
        memory = _memory_of(picture)
    with _MEMORY.hold(memory):
        with _decoding():
            rgb = _to_rgb(picture)
        del picture
        yield content, rgb


def picture_format(content: bytes) -> str:
    """Return Pillow's name of the format, such as "JPEG"; raises DataError as `decode_rgb`."""
    with _decoding():
        return _opened(content).format or ""


def read_text(content: bytes, tag: int) -> tuple[dict[str, str], str | None]:
    """Return the text chunks of a PNG, and the text of an EXIF tag of others.

    Raises DataError as `decode_rgb`.
    """
    with _decoding():
        picture = _opened(content)
        if picture.format != "PNG":
            return {}, str(picture.getexif().get(tag, ""))
        with _MEMORY.hold(_memory_of(picture)):
            picture.load()  # text may follow the pixels
        return {key: str(value) for key, value in getattr(picture, "text", {}).items()}, None


def _opened(content: bytes) -> ImageFile.ImageFile:
    """Return a picture with only its header read; raises DataError and Pillow's errors."""
    if not content:
        raise DataError("the file is empty")
    try:
        picture = Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        raise DataError(_not_a_picture(content)) from error
    if picture.format == "EPS":  # a program, which Pillow would run with Ghostscript
        raise DataError("a PostScript file; convert it to PNG")
    _check_pixels(picture.width * picture.height)
    if (needed := _memory_of(picture)) > MEMORY_BYTES:
        raise DataError(
            f"{picture.width} x {picture.height} pixels, which need {needed / 2**30:.1f} GiB of "
            f"memory to decode from {picture.format}; at most {MEMORY_BYTES >> 30} GiB are used; "
            "make it smaller, or convert it to JPEG or PNG"
        )
    return picture


def _check_pixels(count: int) -> None:
    if count > MAX_PIXELS:
        raise DataError(
            f"{count / 1e6:,.0f} million pixels; at most {MAX_PIXELS / 1e6:.0f} million are read; "
            "make it smaller"
        )


def _not_a_picture(content: bytes) -> str:
    """Return what bytes are if no decoder knows them."""
    found = sniff_bytes(content)
    if found.is_spoilt:
        return f"not a picture: it {found.words}; {found.remedy}"
    return "not a picture Pillow can read"


def _memory_of(picture: ImageFile.ImageFile) -> int:
    """Return the most bytes that decoding can need, according to the header."""
    stored = _NARROW_MODES.get(picture.mode, 4)
    decoding, kept = _DECODER_BYTES.get(picture.format or "", (0, 0))
    further = 8 if picture.mode.startswith("I") else 4  # to rotate it, or to convert it to RGB
    pixels = picture.width * picture.height
    in_strips = 0
    if picture.mode in _WITH_ALPHA or "transparency" in picture.info:
        in_strips = 20 * min(pixels, _STRIP_PIXELS + picture.width)
    return pixels * (stored + max(decoding, kept + further)) + in_strips


def _to_rgb(opened: ImageFile.ImageFile) -> Image.Image:
    """Return the result of `decode_rgb`; without a copy if nothing changes, as it may be large."""
    opened.load()
    is_16_bit = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PNG")
    ImageOps.exif_transpose(opened, in_place=True)
    image: Image.Image = opened
    if is_16_bit:
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):  # Pillow would clip these at 255 without a warning
        raise DataError(
            f"pixel mode {image.mode} has no fixed white value; convert it to 8 or 16 bit"
        )
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Return a transparent picture on white, strip by strip, to avoid five copies in memory."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return rgb


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn any error of a decoder into a DataError with a reason for users."""
    try:
        with _quiet():
            yield
    except DataError:
        raise
    except Image.DecompressionBombError as error:  # for a part, or by a lower limit of the process
        told = re.search(r"\((\d+) pixels\)", str(error))
        _check_pixels(int(told[1]) if told else MAX_PIXELS + 1)
        raise DataError("more pixels than this process lets Pillow read; make it smaller") from None
    except MemoryError as error:
        raise DataError("there is not enough memory to decode it; make it smaller") from error
    except Exception as error:  # decoders raise a dozen types (struct, zlib, ...) on damaged bytes
        logger.debug("a decoder says: %s: %s", type(error).__name__, error)
        raise DataError(_damage(error)) from error


def _damage(error: Exception) -> str:
    text = str(error).lower()
    if "truncated" in text or "unexpected end" in text or "not enough image data" in text:
        return "cut short: its end is missing"
    if isinstance(error, NotImplementedError) or "not available" in text or "unsupported" in text:
        return "in a format that cannot be decoded here; convert it to PNG or JPEG"
    return "damaged: it cannot be decoded"


class _Quiet:
    """Blocks in which Pillow and libtiff print nothing, in any number of threads.

    Warning filters, the level of Pillow's log and libtiff's handlers belong to the whole process:
    the first thread changes them, and the last one restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._changed = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Silence the block."""
        with self._lock:
            if self._num_inside == 0:
                self._changed.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
                self._changed.enter_context(_silent_libtiff())
                log = logging.getLogger("PIL")
                self._changed.callback(log.setLevel, log.level)
                log.setLevel(logging.CRITICAL + 1)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if self._num_inside == 0:
                    self._changed.close()


@contextmanager
def _silent_libtiff() -> Iterator[None]:
    """Keep libtiff from writing to the terminal, which it does in C, without Python's streams.

    Removing its handlers is its documented way, and does not affect other threads' use of stderr.
    """
    setters = []
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        # Found through Pillow's module, which is linked to the libtiff that it uses, if it has one.
        setter = getattr(ctypes.CDLL(_imaging.__file__), name, None)
        if setter is not None:
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setters.append((setter, setter(None)))
    try:
        yield
    finally:
        for setter, before in setters:
            setter(before)


_quiet = _Quiet()
