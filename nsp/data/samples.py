"""The parts of a captioned picture from any source, and the reasons why one is unusable."""

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nsp.data.pictures import PICTURE_SUFFIXES
from nsp.errors import DataError

MAX_CLASSES = 1_000_000  # a larger number is not a class
CAPTION_SUFFIX, CLASS_SUFFIX = ".txt", ".cls"
CAPTIONS_SUFFIX, JSON_SUFFIX = ".caption", ".json"  # other places of captions (see captions.py)
BESIDE_SUFFIXES = frozenset({CAPTION_SUFFIX, CAPTIONS_SUFFIX, JSON_SUFFIX})
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
TAR_SUFFIXES = PICTURE_SUFFIXES | BESIDE_SUFFIXES | {CLASS_SUFFIX}


@dataclass(frozen=True)
class Sample:
    """One picture: `name` is its path in the folder or its key in the tar, in printable form.

    `captions` are all its different captions, empty in a set without captions.
    """

    name: str
    captions: tuple[str, ...]
    class_id: int | None

    @property
    def caption(self) -> str:
        """The first caption, or an empty one."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def shown(name: str) -> str:
    """Return a file name as text that can be encoded: `\\xe9` for a byte that is not UTF-8."""
    return _HALF_CHARACTER.sub(_escape, name)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])  # U+DC80 to U+DCFF: Python's form of a byte that was not UTF-8
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def drawn_caption(count: int, *, seed: int, epoch: int, number: int) -> int:
    """Return which of `count` captions sample `number` has in an epoch, depending only on `seed`.

    Crops use the same key with another counter (see crops.py), so neither affects the other.
    """
    if count < 2:
        return 0
    philox = np.random.Philox(
        key=np.array([seed, epoch], dtype=np.uint64),
        counter=np.array([0, 0, 1, number], dtype=np.uint64),
    )
    return int(np.random.Generator(philox).integers(count))


def tar_key(name: str) -> tuple[str, str]:
    """Return the webdataset key and the suffix of a member: a key ends at its file's first dot.

    A key is printable: bytes that are not UTF-8 are escaped.
    """
    folder, base = posixpath.split(posixpath.normpath(shown(name)))
    stem, dot, suffix = base.partition(".")
    return posixpath.join(folder, stem), (dot + suffix).lower()


def leads_out(key: str) -> bool:
    """Return whether a key leads out of its tar, as /etc/a and ../a do."""
    return key.startswith("/") or key.split("/")[0] == ".."


def check_key(key: str) -> None:
    """Raise DataError with only the reason for a key that is not safe to unpack."""
    if leads_out(key):
        raise DataError("its name leads out of the tar; pack it again with relative names")
    if "\0" in key:
        raise DataError("its name has a null character")


def is_picture(name: str) -> bool:
    """Return whether a file is a picture by its suffix."""
    return posixpath.splitext(name)[1].lower() in PICTURE_SUFFIXES


def stem(name: str) -> str:
    """Return a name without its suffix."""
    return posixpath.splitext(name)[0]


def is_hidden(name: str) -> bool:
    """Return whether a file, or a folder around it, is hidden."""
    return any(part.startswith(".") for part in posixpath.normpath(name).split("/"))


def picture_suffix(suffixes: Iterable[str]) -> str:
    """Return the suffix of a tar sample's only picture; otherwise DataError with the reason."""
    pictures = [suffix for suffix in suffixes if suffix in PICTURE_SUFFIXES]
    if len(pictures) != 1:
        what = " and ".join(pictures) if pictures else "no picture"
        raise DataError(f"a caption needs one picture, but it has {what}")
    return pictures[0]


def parse_caption(caption: bytes | str) -> str:
    """Return the caption as text; DataError with only the reason if it is not text."""
    try:
        text = caption.decode("utf-8-sig") if isinstance(caption, bytes) else caption
        text.encode()  # JSON can contain lone surrogates
    except UnicodeError as error:
        raise DataError("its caption is not UTF-8") from error
    if not text.strip():
        raise DataError("its caption is empty")
    if "\0" in text:  # other bytes, such as UTF-16 without a byte-order mark
        raise DataError("its caption has a null character")
    return text.strip()


def parse_class(content: bytes, num_classes: int) -> int:
    """Return the class of a `.cls` member; 0 `num_classes`: unknown. DataError as above."""
    text = content.decode("ascii", "replace").strip()
    if not text.isdecimal():
        raise DataError(f"its class is {text[:20]!r}, not a number")
    if len(text) > 9 or int(text) >= (num_classes or MAX_CLASSES):
        most = (num_classes or MAX_CLASSES) - 1
        raise DataError(f"its class is {text[:20]}; classes here are 0 to {most}")
    return int(text)
