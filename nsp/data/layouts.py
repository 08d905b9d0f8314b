"""Finds the samples of a folder or a tar: which files are pictures, and where each caption is.

A folder is read as the first of these that fits:

1. `metadata.jsonl` at its top: one {"file_name": ..., "text": ...} a line (as in
   Hugging Face imagefolder).
2. A picture anywhere inside has a `.txt` of the same name beside it: captions are those files.
3. Pictures lie in subfolders: the subfolder is the class, and its name the caption.
4. It holds no picture but `.tar` files at its top: shards, read one after the other.

A tar holds pairs `<key>.<picture suffix>` and `<key>.txt` (a webdataset sample), uncompressed, and
may hold the number of a class in `<key>.cls`; `index.json` beside it (see pack.py) names classes.

Either may carry a list `__heldout__` at its top (see heldout.py).

Hidden files are passed over; other files that play no part are named in a warning. What plays a
part and cannot be used (a picture without a caption, a caption without a picture) is a Problem.
"""

import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from nsp.data.heldout import HELDOUT_MEMBER, parse_heldout
from nsp.data.index import INDEX_FILE, read_index
from nsp.data.pictures import PICTURE_SUFFIXES
from nsp.data.samples import (
    CAPTION_SUFFIX,
    CLASS_SUFFIX,
    TAR_SUFFIXES,
    Problem,
    Sample,
    is_hidden,
    parse_caption,
    parse_class,
    picture_suffix,
    tar_key,
)
from nsp.data.tars import open_tar, walk
from nsp.errors import DataError

METADATA_FILE = "metadata.jsonl"
LAYOUTS = (
    f"{METADATA_FILE} with file_name and text, a .txt beside each picture, one subfolder per class"
    ", or .tar shards"
)


class PictureFile(Protocol):
    """Where the bytes of one picture lie; safe to read from any thread and to pickle."""

    @property
    def path(self) -> Path:
        """The file to repair when the picture is damaged."""

    def read(self) -> bytes:
        """Return the bytes; raises OSError."""


@dataclass(frozen=True)
class FileSlice:
    """A whole file, or a member of a tar."""

    path: Path
    offset: int = 0
    num_bytes: int = -1  # -1: to the end of the file

    def read(self) -> bytes:
        """Return the bytes; opens the file anew, so threads and forked workers do not collide."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.num_bytes)


Entry = tuple[Sample, PictureFile]


@dataclass
class Listing:
    """What was found, before any picture is decoded."""

    entries: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    heldout: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, caption: bytes | str, file: PictureFile, class_id: int | None) -> None:
        """Append a sample, or a problem when its caption is empty or not UTF-8."""
        try:
            sample = Sample(name, parse_caption(caption), class_id)
        except DataError as error:
            self.problems.append(Problem(name, str(error)))
        else:
            self.entries.append((sample, file))


def list_folder(root: Path) -> Listing:
    """Return what lies in a folder; raises DataError when no layout fits."""
    names = sorted(_walk(root))
    pictures = [name for name in names if _is_picture(name)]
    present = set(names)
    if METADATA_FILE in present:
        listing = _list_metadata(root, pictures)
        used = {METADATA_FILE, *pictures}
    elif any(_caption_name(name) in present for name in pictures):
        listing = _list_sidecars(root, names, pictures)
        used = {name for name in names if _is_picture(name) or name.endswith(".txt")}
    elif any("/" in name for name in pictures):
        listing = _list_classes(root, pictures)
        used = set(pictures)
    elif pictures:
        raise DataError(f"{root}: {len(pictures)} pictures, no captions; accepted are {LAYOUTS}")
    else:
        shards = [name for name in names if name.endswith(".tar") and "/" not in name]
        if not shards:
            raise DataError(f"{root}: no picture in this folder; accepted are {LAYOUTS}")
        listing = _join(list_tar(root / name) for name in shards)
        used = {*shards, INDEX_FILE}
    if HELDOUT_MEMBER in present:
        path = root / HELDOUT_MEMBER
        listing.heldout += parse_heldout(path.read_text("utf-8"), where=str(path))
    listing.unused += [name for name in names if name not in used | {HELDOUT_MEMBER}]
    return listing


def list_tar(path: Path) -> Listing:
    """Return what lies in an uncompressed tar; raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file, open_tar(file, seekable=True) as archive:
            members = list(walk(archive))
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{path}: not a whole, uncompressed tar ({error}); unpack a compressed one first"
        ) from error
    files = {
        posixpath.normpath(member.name): FileSlice(path, member.offset_data, member.size)
        for member in members
    }
    listing = Listing()
    index = read_index(path.parent)
    if index is not None and path.name in {shard.file for shard in index.shards}:
        listing.class_names = index.class_names
    if HELDOUT_MEMBER in files:
        text = files.pop(HELDOUT_MEMBER).read().decode("utf-8")
        listing.heldout = parse_heldout(text, where=f"{path}: {HELDOUT_MEMBER}")
    samples: dict[str, dict[str, FileSlice]] = {}
    for name in sorted(files):
        if is_hidden(name):
            continue
        key, suffix = tar_key(name)
        if suffix in TAR_SUFFIXES:
            samples.setdefault(key, {})[suffix] = files[name]
        else:
            listing.unused.append(name)
    for key, by_suffix in samples.items():
        try:
            picture = by_suffix[picture_suffix(key, by_suffix)]
            class_id = None
            if CLASS_SUFFIX in by_suffix:
                content = by_suffix[CLASS_SUFFIX].read()
                class_id = parse_class(content, len(listing.class_names))
        except DataError as error:
            listing.problems.append(Problem(key, str(error)))
        else:
            listing.add(key, by_suffix[CAPTION_SUFFIX].read(), picture, class_id)
    return listing


def _join(listings: Iterable[Listing]) -> Listing:
    joined = Listing()
    for listing in listings:
        joined.entries += listing.entries
        joined.problems += listing.problems
        joined.unused += listing.unused
        joined.heldout += listing.heldout
        joined.class_names = joined.class_names or listing.class_names
    return joined


def _list_metadata(root: Path, pictures: list[str]) -> Listing:
    listing = Listing()
    rows: list[tuple[str, str]] = []
    lines = (root / METADATA_FILE).read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"{METADATA_FILE}:{number}"
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            listing.problems.append(Problem(where, f"not JSON: {error}"))
            continue
        if row is None:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            listing.problems.append(Problem(where, "the row has no file_name"))
        elif not isinstance(row.get("text"), str):
            listing.problems.append(Problem(row["file_name"], f"no text in {where}"))
        else:
            rows.append((posixpath.normpath(row["file_name"]), row["text"]))
    repeats = Counter(name for name, _ in rows)
    for name, text in rows:
        if not (root / name).is_file() or name.startswith(("/", "..")):
            listing.problems.append(Problem(name, f"in {METADATA_FILE} but not in the folder"))
        elif repeats[name] > 1:
            listing.problems.append(Problem(name, f"{repeats[name]} rows in {METADATA_FILE}"))
        else:
            listing.add(name, text, FileSlice(root / name), None)
    named = set(repeats) | {problem.name for problem in listing.problems}
    listing.problems += [
        Problem(name, f"no row in {METADATA_FILE}") for name in pictures if name not in named
    ]
    return listing


def _list_sidecars(root: Path, names: list[str], pictures: list[str]) -> Listing:
    listing = Listing()
    captions = {name for name in names if name.endswith(".txt")}
    for name in pictures:
        caption = _caption_name(name)
        if caption in captions:
            listing.add(name, (root / caption).read_bytes(), FileSlice(root / name), None)
        else:
            listing.problems.append(Problem(name, f"no caption file {caption}"))
    orphans = captions - {_caption_name(name) for name in pictures}
    listing.problems += [Problem(name, "a caption without a picture") for name in sorted(orphans)]
    return listing


def _list_classes(root: Path, pictures: list[str]) -> Listing:
    names = sorted({name.split("/")[0] for name in pictures if "/" in name})
    listing = Listing(class_names=tuple(names))
    class_ids = {name: class_id for class_id, name in enumerate(names)}
    for name in pictures:
        folder, _, rest = name.partition("/")
        if not rest:
            listing.problems.append(Problem(name, "not inside a class folder"))
        elif "/" in rest:
            listing.problems.append(Problem(name, f"not directly inside class folder {folder}"))
        else:
            listing.add(name, folder, FileSlice(root / name), class_ids[folder])
    return listing


def _walk(root: Path) -> Iterable[str]:
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        relative = Path(folder).relative_to(root)
        for name in files:
            if not is_hidden(name):
                yield (relative / name).as_posix()


def _is_picture(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _caption_name(picture: str) -> str:
    return posixpath.splitext(picture)[0] + ".txt"
