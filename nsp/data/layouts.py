"""Finds the samples of a folder: its pictures and their captions.

Captions are searched everywhere, and all that are found are used or named in a warning:

1. tables anywhere inside (metadata.jsonl and others: see captions.py);
2. `.txt`, `.caption` or `.json` next to a picture, with its name.

If a picture has several of these, the first of `metadata.jsonl` at the top, `.txt`, another table,
`.caption`, `.json` is used, and a warning says where they differ. Tables of the same rank that
differ are an error.

A folder without captions is read as one of these:

3. Pictures are in subfolders: the subfolder is the class, and its name the caption.
4. Pictures are at the top: a set without captions.
5. There is no picture, but there are `.tar` files at the top: shards, read one after the other
(see shard_listing.py).

A folder may have a list `__heldout__` at its top (see heldout.py). Hidden files are skipped; a
warning names other files that are not used. A file that should be used but cannot be (a picture
without a caption, a caption without a picture) is a Problem.
"""

import posixpath
from pathlib import Path

from nsp.data.bounds import MAX_CAPTION_BYTES, read_regular
from nsp.data.captioned import METADATA_FILE, Beside, Tables, list_captioned
from nsp.data.captions import TABLE_SUFFIXES, Table, read_table
from nsp.data.heldout import HELDOUT_MEMBER, read_heldout
from nsp.data.index import INDEX_FILE
from nsp.data.listing import FileSlice, Listing, join
from nsp.data.pictures import PICTURE_SUFFIXES
from nsp.data.samples import (
    BESIDE_SUFFIXES,
    CAPTION_SUFFIX,
    CAPTIONS_SUFFIX,
    JSON_SUFFIX,
    is_picture,
    shown,
    stem,
)
from nsp.data.shard_listing import list_tar
from nsp.errors import DataError
from nsp.paths import describe, wrong_path
from nsp.walk import Walk, walk_folder

LAYOUTS = (
    f"{METADATA_FILE} with file_name and text, a .txt next to each picture, one subfolder per class"
    ", pictures alone, or .tar shards"
)
_ARCHIVES = (".zip", ".rar", ".7z", ".tgz", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
# Kinds of folders (see nsp/paths.py) whose pictures are not a data set.
_OTHERS = ("run", "saved step", "unfinished export", "hub model", "weights folder", "onnx")
_MOST_LOOKED_AT = 50  # .json files examined although their names do not mention captions
_TELLING = ("metadata", "caption", "annotation", "prompt")


def list_folder(root: Path) -> Listing:
    """Return a folder's content; raises DataError if no layout fits, OSError if not readable."""
    walk = walk_folder(root)
    names = [name for name in walk.files if name != HELDOUT_MEMBER]
    pictures = [name for name in names if is_picture(name)]
    is_packed = not pictures and bool(_shards(names)) and METADATA_FILE not in names
    tables = Tables(root, names, [] if is_packed else _tables(root, names, pictures))
    beside = Beside(root, names, pictures)
    if tables.taken or beside.has_captions:
        _refuse_packed(root, names, tables)
        listing = list_captioned(root, names, pictures, tables, beside)
    elif pictures:
        _refuse_apart(root, names, pictures)
        listing = _list_uncaptioned(root, pictures)
        listing.leave(name for name in names if not is_picture(name))
    else:
        listing = _list_shards(root, names)
    _report(walk, listing)
    listing.heldout += read_heldout(root)
    return listing


def _tables(root: Path, names: list[str], pictures: list[str]) -> list[Table]:
    """Return every table of captions, the one at the top first."""
    stems = {stem(name) for name in pictures}
    candidates = []
    num_looked_at = 0
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        base, suffix = posixpath.basename(name).lower(), posixpath.splitext(name)[1].lower()
        tells = any(word in base for word in _TELLING)
        if suffix not in TABLE_SUFFIXES or name == INDEX_FILE:
            continue
        if suffix in BESIDE_SUFFIXES and stem(name) in stems and base != METADATA_FILE:
            continue  # it belongs to one picture
        if suffix == CAPTION_SUFFIX and "caption" not in base:
            continue
        if suffix == JSON_SUFFIX and not tells:
            num_looked_at += 1
            if num_looked_at > _MOST_LOOKED_AT:
                continue
        candidates.append(name)
    tables = [table for name in candidates if (table := read_table(root, name)) is not None]
    return sorted(tables, key=lambda table: table.name != METADATA_FILE)


def _refuse_packed(root: Path, names: list[str], tables: Tables) -> None:
    """Raise DataError when all pictures named by rows are still in an archive."""
    archives = [name for name in names if name.lower().endswith(_ARCHIVES)]
    if tables.bad and archives and not tables.captions:
        raise DataError(
            f"{root}: the folder has none of the pictures named in {shown(tables.taken[0])}, "
            f"but it has {shown(archives[0])}; unpack that there"
        )


def _refuse_apart(root: Path, names: list[str], pictures: list[str]) -> None:
    """Raise DataError when caption files are not next to the pictures of their names."""
    of = {posixpath.basename(stem(name)): name for name in pictures}
    of |= {posixpath.basename(name): name for name in pictures}
    apart = [
        name
        for name in names
        if name.lower().endswith((CAPTION_SUFFIX, CAPTIONS_SUFFIX))
        and posixpath.basename(stem(name)) in of
    ]
    if apart and _is_prose(root / apart[0]):
        picture = of[posixpath.basename(stem(apart[0]))]
        raise DataError(
            f"{root}: {shown(apart[0])} ({len(apart)} such files) seems to be the "
            f"caption of {shown(picture)}; move it to "
            f"{shown(stem(picture) + posixpath.splitext(apart[0])[1].lower())}, or remove it"
        )


def _is_prose(path: Path) -> bool:
    """Return whether a file has words; object boxes, for example, are numbers."""
    try:
        text = read_regular(path, most_bytes=MAX_CAPTION_BYTES).decode("utf-8", "replace")
    except (OSError, DataError):
        return False
    return any(character.isalpha() for character in text)


def _list_uncaptioned(root: Path, pictures: list[str]) -> Listing:
    """Return pictures of class folders, or pictures alone."""
    if not any("/" in name for name in pictures):
        listing = Listing(missing=None)
        for name in pictures:
            listing.add(name, (), FileSlice(root / name))
        return listing
    direct = [name for name in pictures if name.count("/") == 1]
    below = sorted({posixpath.dirname(posixpath.dirname(name)) for name in pictures})
    if not direct and "" not in below:
        given = " or ".join(str(root / folder) for folder in below[:3])
        raise _no_set(
            root,
            "pictures of classes must be directly in a subfolder, but "
            f"{shown(pictures[0])} is not; give the folder with the class folders: {given}",
        )
    names = sorted({name.split("/")[0] for name in pictures if "/" in name})
    listing = Listing(class_names=tuple(shown(name) for name in names))
    class_ids = {name: class_id for class_id, name in enumerate(names)}
    for name in pictures:
        folder, _, rest = name.partition("/")
        if not rest:
            listing.refuse(name, "not inside a class folder")
        elif "/" in rest:
            listing.refuse(name, f"not directly inside class folder {shown(folder)}")
        else:
            listing.add(name, [shown(folder)], FileSlice(root / name), class_ids[folder])
    return listing


def _list_shards(root: Path, names: list[str]) -> Listing:
    """Return the content of the shards in a folder without pictures."""
    shards = _shards(names)
    if not shards:
        tables = [name for name in names if name.lower().endswith((".parquet", ".arrow"))]
        archives = [name for name in names if name.lower().endswith(_ARCHIVES)]
        if tables:
            raise DataError(
                f"{root}: no picture, but {shown(tables[0])}, the form of Hugging Face's "
                f"`datasets`; give hf:{root}"
            )
        if archives:
            raise DataError(f"{root}: no picture, but {shown(archives[0])}; unpack it")
        raise _no_set(root, f"no picture in this folder; accepted are {LAYOUTS}")
    listing = join(list_tar(root / name) for name in shards)
    listing.leave(name for name in names if name not in {*shards, INDEX_FILE})
    return listing


def _no_set(root: Path, reason: str) -> DataError:
    """Return the error for a folder that is not a data set: what it is instead, or the reason."""
    found = describe(root)
    if found.model is None and found.kind not in _OTHERS:
        return DataError(f"{root}: {reason}")
    return DataError(f"{wrong_path(root, 'data', found)}; accepted are {LAYOUTS}")


def _shards(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".tar") and "/" not in name]


def _report(walk: Walk, listing: Listing) -> None:
    """Add the entries that the walk could not use or did not follow."""
    for name, reason in walk.unusable:
        suffix = posixpath.splitext(name)[1].lower()
        if (
            suffix in PICTURE_SUFFIXES
            or suffix == CAPTION_SUFFIX
            or reason.startswith("the folder")
        ):
            listing.refuse(name, reason)
        else:
            listing.leave([f"{name} ({reason})"])
    listing.leave(f"{name} (a link to a folder that is already read)" for name in walk.not_followed)
