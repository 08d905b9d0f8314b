"""What a captioned picture is made of, wherever it lies, and what makes one unusable."""

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass

from nsp.data.pictures import PICTURE_SUFFIXES
from nsp.errors import DataError

MAX_CLASSES = 1_000_000  # a larger number is no class
CAPTION_SUFFIX, CLASS_SUFFIX = ".txt", ".cls"
TAR_SUFFIXES = PICTURE_SUFFIXES | {CAPTION_SUFFIX, CLASS_SUFFIX}


@dataclass(frozen=True)
class Sample:
    """One captioned picture: `name` is its path in the folder (or its key in the tar)."""

    name: str
    caption: str
    class_id: int | None


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def tar_key(name: str) -> tuple[str, str]:
    """Return the webdataset key and the suffix of a member: a key ends at its file's first dot."""
    folder, base = posixpath.split(posixpath.normpath(name))
    stem, dot, suffix = base.partition(".")
    return posixpath.join(folder, stem), (dot + suffix).lower()


def is_hidden(name: str) -> bool:
    """Return whether a file, or a folder it lies in, is hidden."""
    return any(part.startswith(".") for part in posixpath.normpath(name).split("/"))


def picture_suffix(key: str, suffixes: Iterable[str]) -> str:
    """Return the suffix of a tar sample's one picture; DataError with the bare reason without."""
    pictures = [suffix for suffix in suffixes if suffix in PICTURE_SUFFIXES]
    if CAPTION_SUFFIX not in suffixes:
        raise DataError(f"no {key}{CAPTION_SUFFIX} with its caption in the tar")
    if len(pictures) != 1:
        what = " and ".join(pictures) if pictures else "no picture"
        raise DataError(f"a caption needs one picture, it has {what}")
    return pictures[0]


def parse_caption(caption: bytes | str) -> str:
    """Return the caption as text; DataError with the bare reason when empty or not UTF-8."""
    try:
        text = caption.decode("utf-8-sig") if isinstance(caption, bytes) else caption
    except UnicodeDecodeError as error:
        raise DataError("its caption is not UTF-8") from error
    if not text.strip():
        raise DataError("its caption is empty")
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
