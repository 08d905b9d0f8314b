"""Lists a folder with captions, from its tables and from the files next to its pictures."""

import logging
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nsp.data.bounds import MAX_CAPTION_BYTES, read_regular
from nsp.data.captions import Table, captions_beside
from nsp.data.listing import FileSlice, Listing
from nsp.data.samples import (
    BESIDE_SUFFIXES,
    CAPTION_SUFFIX,
    CAPTIONS_SUFFIX,
    JSON_SUFFIX,
    is_hidden,
    is_picture,
    parse_caption,
    shown,
    stem,
)
from nsp.errors import DataError

logger = logging.getLogger(__name__)

METADATA_FILE = "metadata.jsonl"


class Beside:
    """The caption files next to pictures, with the same names."""

    def __init__(self, root: Path, names: Iterable[str], pictures: Iterable[str]) -> None:
        self._root = root
        self._present = {
            stem(name) + suffix.lower(): name
            for name in names
            if (suffix := posixpath.splitext(name)[1]).lower() in BESIDE_SUFFIXES
        }
        self._of: dict[str, dict[str, str]] = {}
        for name in pictures:
            files = {suffix: self._present.get(stem(name) + suffix) for suffix in BESIDE_SUFFIXES}
            if found := {suffix: file for suffix, file in files.items() if file is not None}:
                self._of[name] = found
        self.differing: list[str] = []  # pictures whose files have different captions
        self.suffixes = {suffix for found in self._of.values() for suffix in found}
        # A .json may be about anything: only its content shows whether it is a caption.
        self.suffixes -= {JSON_SUFFIX}
        self.has_captions = bool(self.suffixes) or any(map(self._has_caption, self._of))
        self.used = {file for found in self._of.values() for file in found.values()}

    def _has_caption(self, name: str) -> bool:
        try:
            return bool(self.captions(name)[0])
        except DataError:
            return False

    def captions(self, name: str) -> tuple[Sequence[bytes | str], bool]:
        """Return a picture's captions, and whether they are from a `.txt`; DataError when bad."""
        if not self.has_files(name):
            return (), False
        files = self._of[name]
        readers = {
            suffix: partial(read_regular, self._root / file, most_bytes=MAX_CAPTION_BYTES)
            for suffix, file in files.items()
        }
        captions, differs = captions_beside(readers)
        if differs:
            self.differing.append(name)
        return captions, CAPTION_SUFFIX in files

    def has_files(self, name: str) -> bool:
        """Return whether a picture has a file next to it."""
        return name in self._of

    def orphans(self) -> list[str]:
        """Return the caption files without a picture, of the suffix that counts most."""
        main = CAPTION_SUFFIX if CAPTION_SUFFIX in self.suffixes else CAPTIONS_SUFFIX
        return sorted(
            file
            for key, file in self._present.items()
            if key.endswith(main) and file not in self.used
        )


@dataclass
class _Stated:
    """The captions that a table states for a picture."""

    table: str
    captions: list[str]


class Tables:
    """The pictures of a folder that the rows of its tables name, and their captions."""

    def __init__(self, root: Path, names: Iterable[str], found: Iterable[Table]) -> None:
        """Match every row; DataError if tables of the same rank differ.

        Tables about pictures outside the folder are not used.
        """
        self._root = root
        self._names = set(names)
        self._by_base: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            if is_picture(name):
                base = posixpath.basename(name)
                for key in {base, stem(base)}:
                    self._by_base[key].append(name)
        self.captions: dict[str, _Stated] = {}
        self.bad: list[tuple[str, str]] = []  # rows: the picture or row, and the reason
        self.differing: list[str] = []
        self.taken: list[str] = []  # names of the tables that are used
        strange = [(table, self._take(table)) for table in found]
        for table, missing in strange:
            if table.name in self.taken or (not table.is_guess and not self.captions):
                self.taken += [] if table.name in self.taken else [table.name]
                reason = f"in {shown(table.name)} but not in the folder"
                self.bad += [(name, reason) for name in missing]
        self.is_first = (
            METADATA_FILE in self.taken
        )  # this table counts more than all other captions

    def _take(self, table: Table) -> list[str]:
        """Add the rows of a table whose pictures exist; return the names in the other rows."""
        named: dict[str, list[str]] = {}
        missing = []
        for row in table.rows:
            name = self._find(table.name, row.file_name)
            if name is None:
                missing.append(row.file_name)
            else:
                named.setdefault(name, []).extend(row.captions)
        if named or table.bad or table.name == METADATA_FILE:
            self.taken.append(table.name)
        self.bad += [(self._find(table.name, name) or name, why) for name, why in table.bad]
        for name, captions in named.items():
            before = self.captions.setdefault(name, _Stated(table.name, captions))
            if set(captions) <= set(before.captions):
                continue
            if before.table != METADATA_FILE:
                raise DataError(
                    f"{self._root}: {shown(before.table)} and {shown(table.name)} have "
                    f"different captions for {shown(name)}; keep one of them"
                )
            self.differing.append(name)
        return missing

    def _find(self, table: str, file_name: str) -> str | None:
        """Return the file of a row: relative to the table or to the top, or the only match."""
        spellings = dict.fromkeys((file_name, file_name.replace("\\", "/")))
        for spelling in spellings:
            for folder in dict.fromkeys((posixpath.dirname(table), "")):
                name = posixpath.normpath(posixpath.join(folder, spelling))
                if name in self._names or self._is_hidden_file(name):
                    return name
        for spelling in spellings:
            wanted = f"/{posixpath.normpath(spelling)}"
            found = [
                name
                for name in self._by_base.get(posixpath.basename(wanted), ())
                if f"/{name}".endswith(wanted) or f"/{stem(name)}".endswith(wanted)
            ]
            if len(found) == 1:
                return found[0]
        return None

    def _is_hidden_file(self, name: str) -> bool:
        """Return whether a row names a file that a walk skips."""
        if name.startswith(("/", "..")) or not is_hidden(name):
            return False
        try:
            return (self._root / name).is_file()
        except (OSError, ValueError):  # a name that no file system allows
            return False


def list_captioned(
    root: Path, names: list[str], pictures: list[str], tables: Tables, beside: Beside
) -> Listing:
    """Return the pictures with their captions from tables and from files next to them."""
    listing = Listing(missing=_missing(tables, beside))
    for name, reason in tables.bad:
        listing.refuse(name, reason)
    refused = {name for name, _ in tables.bad}
    by_rows = tables.is_first or CAPTION_SUFFIX not in beside.suffixes
    differing = set(tables.differing)
    for name in dict.fromkeys([*(tables.captions if by_rows else ()), *pictures, *tables.captions]):
        stated = tables.captions.get(name)
        try:
            read, is_txt = beside.captions(name) if beside.has_captions else ((), False)
        except DataError as error:
            if stated is None:
                listing.refuse(name, str(error))
                continue
            read, is_txt = (), False
        if stated is None:
            if read or name not in refused:
                listing.add(name, read, FileSlice(root / name))
            continue
        kept: Sequence[bytes | str] = stated.captions
        other: Sequence[bytes | str] = read
        if read and is_txt and stated.table != METADATA_FILE:
            kept, other = read, stated.captions
        if not _texts(other) <= _texts(kept):
            differing.add(name)
        listing.add(name, kept, FileSlice(root / name))
    used = {*pictures, *tables.taken, *tables.captions}
    if beside.has_captions:
        used |= beside.used
        for name in [] if tables.is_first else beside.orphans():
            if name not in used:
                listing.refuse(name, "a caption without a picture")
                used.add(name)
        differing |= set(beside.differing)
    _warn_of_differing(root, sorted(differing))
    listing.leave(name for name in names if name not in used)
    return listing


def _missing(tables: Tables, beside: Beside) -> str:
    """Return why a picture has no caption although others have one."""
    rows = f"no row in {shown(tables.taken[0])}" if tables.taken else ""
    if len(tables.taken) > 1:
        rows += " or another table"
    suffixes = sorted(beside.suffixes, reverse=True) or [JSON_SUFFIX]
    files = f"no caption file with its name ({', '.join(suffixes)})" if beside.has_captions else ""
    return " and ".join(part for part in (rows, files) if part)


def _texts(captions: Iterable[bytes | str]) -> set[str]:
    try:
        return {parse_caption(each) for each in captions}
    except DataError:  # reported where the caption is used
        return set()


def _warn_of_differing(root: Path, names: list[str]) -> None:
    if names:
        logger.warning(
            "%s: %d pictures have different captions in different files, such as %s; the first of "
            "metadata.jsonl, .txt, another table, .caption, .json is used; to use all, list them "
            "under captions",
            *(root, len(names), names[0]),
        )
