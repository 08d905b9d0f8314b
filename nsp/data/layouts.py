"""Finds the samples of a folder or a tar: which files are pictures, and where each caption is.

A folder is read as the first of these that fits:

1. `metadata.jsonl` at its top: one {"file_name": ..., "text": ...} a line (as in
   Hugging Face imagefolder).
2. A picture anywhere inside has a `.txt` of the same name beside it: captions are those files.
3. Pictures lie in subfolders: the subfolder is the class, and its name the caption.
4. It holds no picture but `.tar` files at its top: shards, read one after the other.

A tar holds pairs `<key>.<picture suffix>` and `<key>.txt` (a webdataset sample), uncompressed.

Either may carry a file `__heldout__` at its top: a header line, then one `name<TAB>caption` a
line. Those samples, and all others with one of those captions, are seen only by the split
'heldout'.

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

from nsp.data.pictures import PICTURE_SUFFIXES
from nsp.data.tars import open_tar, walk
from nsp.errors import DataError

METADATA_FILE = "metadata.jsonl"
HELDOUT_MEMBER = "__heldout__"  # webdataset readers pass over names of this form
LAYOUTS = (
    f"{METADATA_FILE} with file_name and text, a .txt beside each picture, one subfolder per class"
    ", or .tar shards"
)


@dataclass(frozen=True)
class Sample:
    """One captioned picture: `name` is its path in the folder (or its key in the tar)."""

    name: str
    caption: str
    class_id: int | None


@dataclass(frozen=True)
class FileSlice:
    """Where the bytes of one picture lie: a whole file, or a member of a tar."""

    path: Path
    offset: int = 0
    num_bytes: int = -1  # -1: to the end of the file

    def read(self) -> bytes:
        """Return the bytes; opens the file anew, so threads and forked workers do not collide."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.num_bytes)


Entry = tuple[Sample, FileSlice]


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, and why."""

    name: str
    reason: str


@dataclass
class Listing:
    """What was found, before any picture is decoded."""

    entries: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    heldout: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, caption: bytes | str, file: FileSlice, class_id: int | None) -> None:
        """Append a sample, or a problem when its caption is empty or not UTF-8."""
        try:
            text = caption.decode("utf-8-sig") if isinstance(caption, bytes) else caption
        except UnicodeDecodeError:
            self.problems.append(Problem(name, "its caption is not UTF-8"))
            return
        if not text.strip():
            self.problems.append(Problem(name, "its caption is empty"))
            return
        self.entries.append((Sample(name, text.strip(), class_id), file))


def parse_heldout(text: str, *, where: str) -> list[tuple[str, str]]:
    """Return (name, caption) of each held-out sample; `where` names the list in errors."""
    rows = [tuple(line.split("\t")) for line in text.splitlines()[1:]]
    for number, row in enumerate(rows, start=2):
        if len(row) != 2 or not all(row):
            raise DataError(f"{where}, line {number}: expected name<TAB>caption, got {row}")
    return [(row[0], row[1]) for row in rows]


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
        used = set(shards)
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
    if HELDOUT_MEMBER in files:
        text = files.pop(HELDOUT_MEMBER).read().decode("utf-8")
        listing.heldout = parse_heldout(text, where=f"{path}: {HELDOUT_MEMBER}")
    samples: dict[str, dict[str, str]] = {}
    for name in sorted(files):
        if _is_hidden(name):
            continue
        key, suffix = _tar_key(name)
        if suffix in PICTURE_SUFFIXES or suffix == ".txt":
            samples.setdefault(key, {})[suffix] = name
        else:
            listing.unused.append(name)
    for key, by_suffix in samples.items():
        captions = by_suffix.pop(".txt", None)
        if captions is None:
            listing.problems.append(Problem(key, f"no {key}.txt with its caption in the tar"))
        elif len(by_suffix) != 1:
            what = " and ".join(by_suffix) if by_suffix else "no picture"
            listing.problems.append(Problem(key, f"a caption needs one picture, it has {what}"))
        else:
            (picture,) = by_suffix.values()
            listing.add(key, files[captions].read(), files[picture], None)
    return listing


def _join(listings: Iterable[Listing]) -> Listing:
    joined = Listing()
    for listing in listings:
        joined.entries += listing.entries
        joined.problems += listing.problems
        joined.unused += listing.unused
        joined.heldout += listing.heldout
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
        folders[:] = [name for name in folders if not _is_hidden(name)]
        relative = Path(folder).relative_to(root)
        for name in files:
            if not _is_hidden(name):
                yield (relative / name).as_posix()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _is_picture(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _caption_name(picture: str) -> str:
    return posixpath.splitext(picture)[0] + ".txt"


def _tar_key(name: str) -> tuple[str, str]:
    # A webdataset key ends at the first dot of the file's own name.
    folder, base = posixpath.split(name)
    stem, dot, suffix = base.partition(".")
    return posixpath.join(folder, stem), (dot + suffix).lower()
