"""Held-out samples, which no training run may see: a list of names and captions in the data set.

A folder or tar has it as `__heldout__` at its top: a header line, then one `name<TAB>caption` per
line. These samples are held out, and all others with one of these captions.
"""

import posixpath
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from nsp.data.bounds import read_regular
from nsp.data.samples import shown
from nsp.errors import DataError
from nsp.paths import describe

MAX_HELDOUT_BYTES = 512 << 20
HELDOUT_MEMBER = "__heldout__"  # webdataset readers skip names of this form


def parse_heldout(content: bytes | str, *, where: str) -> list[tuple[str, str]]:
    """Return (name, caption) of each held-out sample; `where` names the list in errors."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8; save it as UTF-8") from error
    rows = [tuple(line.split("\t")) for line in text.splitlines()[1:]]
    for number, row in enumerate(rows, start=2):
        if len(row) != 2 or not all(row):
            raise DataError(f"{where}, line {number}: expected name<TAB>caption, got {row}")
    return [(row[0], row[1]) for row in rows]


def is_heldout(name: str) -> bool:
    """Return whether a member of a tar is its list; `tar` may write its name as ./__heldout__."""
    return posixpath.normpath(name) == HELDOUT_MEMBER


def read_heldout(folder: Path) -> list[tuple[str, str]]:
    """Return the list in a folder, empty if there is none; raises DataError."""
    path = folder / HELDOUT_MEMBER
    # Anything of this name must be a list: if it were ignored, training would see held-out samples.
    try:
        is_file = stat.S_ISREG(path.lstat().st_mode) or path.is_file()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        is_file = True  # perhaps; opening it reports the error
    if not is_file:
        raise DataError(
            f"{shown(str(path))} {shown(describe(path).words)}; a file that lists the held-out "
            "samples is needed here; restore it, or give this another name"
        )
    try:
        content = read_regular(path, most_bytes=MAX_HELDOUT_BYTES)
    except (OSError, DataError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{shown(str(path))} cannot be read: {reason}") from error
    return parse_heldout(content, where=str(path))


def format_heldout(rows: Iterable[tuple[str, str]]) -> str:
    """Return the text of a list, as `parse_heldout` reads it."""
    return "name\tcaption\n" + "".join(f"{name}\t{caption}\n" for name, caption in rows)


@dataclass(frozen=True)
class Heldout:
    """The held-out samples; captions are compared without regard to case and spacing."""

    rows: frozenset[tuple[str, str]]
    names: frozenset[str]
    captions: frozenset[str]

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str]]) -> Self:
        """Return the list of these rows."""
        kept = frozenset(rows)
        return cls(
            rows=kept,
            names=frozenset(name for name, _ in kept),
            captions=frozenset(fold_caption(caption) for _, caption in kept),
        )

    def covers(self, name: str, captions: Iterable[str]) -> bool:
        """Return whether a sample is held out: by its name, or by any of its captions."""
        return name in self.names or any(fold_caption(each) in self.captions for each in captions)


def fold_caption(caption: str) -> str:
    """Return a caption in a form without differences of case and spacing."""
    return " ".join(caption.casefold().split())
