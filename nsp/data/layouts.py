"""Finds the samples of a folder: which files are pictures, and where their captions are.

Captions are looked for everywhere, and all that are found are used or named:

1. tables anywhere inside (metadata.jsonl and others: see captions.py);
2. `.txt`, `.caption` or `.json` beside a picture, of its name.

Where a picture has several of these, the first of `metadata.jsonl` at the top, `.txt`, another
table, `.caption`, `.json` is taken, and a warning says where they differ. Tables of the same rank
that differ are an error.

Only a folder without any is read as one of these:

3. Pictures lie in subfolders: the subfolder is the class, and its name the caption.
4. Pictures lie at the top: a set without captions.
5. It holds no picture but `.tar` files at its top: shards, read one after the other (see
   shard_listing.py).

A folder may carry a list `__heldout__` at its top (see heldout.py). Hidden files are passed over;
other files that play no part are named in a warning. What plays a part and cannot be used (a
picture without a caption, a caption without a picture) is a Problem.
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
    f"{METADATA_FILE} with file_name and text, a .txt beside each picture, one subfolder per class"
    ", pictures alone, or .tar shards"
)
_ARCHIVES = (".zip", ".rar", ".7z", ".tgz", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
# Kinds of folders, as of nsp/paths.py, of which their pictures make no set.
_OTHERS = ("run", "saved step", "unfinished export", "hub model", "weights folder", "onnx")
_MOST_LOOKED_AT = 50  # .json files whose names do not say that they hold captions
_TELLING = ("metadata", "caption", "annotation", "prompt")


def list_folder(root: Path) -> Listing:
    """Return what lies in a folder; raises DataError when no layout fits, OSError when closed."""
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
    """Return every table of captions, that at the top first."""
    stems = {stem(name) for name in pictures}
    candidates = []
    num_looked_at = 0
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        base, suffix = posixpath.basename(name).lower(), posixpath.splitext(name)[1].lower()
        tells = any(word in base for word in _TELLING)
        if suffix not in TABLE_SUFFIXES or name == INDEX_FILE:
            continue
        if suffix in BESIDE_SUFFIXES and stem(name) in stems and base != METADATA_FILE:
            continue  # of one picture
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
    """Raise DataError when all that rows name is still in an archive."""
    archives = [name for name in names if name.lower().endswith(_ARCHIVES)]
    if tables.bad and archives and not tables.captions:
        raise DataError(
            f"{root}: nothing that {shown(tables.taken[0])} names is in the folder, "
            f"but {shown(archives[0])} is; unpack it there"
        )


def _refuse_apart(root: Path, names: list[str], pictures: list[str]) -> None:
    """Raise DataError when captions lie elsewhere than beside the pictures of their names."""
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
            f"caption of {shown(picture)}; put it where it is read, "
            f"{shown(stem(picture) + posixpath.splitext(apart[0])[1].lower())}, or remove it"
        )


def _is_prose(path: Path) -> bool:
    """Return whether a file holds words; boxes of objects, for one, are numbers."""
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
            "no picture lies directly in a subfolder, where classes are, as "
            f"{shown(pictures[0])} does not; give the folder that holds the class folders: {given}",
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
    """Return what the shards of a folder without pictures hold."""
    shards = _shards(names)
    if not shards:
        tables = [name for name in names if name.lower().endswith((".parquet", ".arrow"))]
        archives = [name for name in names if name.lower().endswith(_ARCHIVES)]
        if tables:
            raise DataError(
                f"{root}: no picture, but {shown(tables[0])}, as Hugging Face's "
                f"`datasets` keeps them; give hf:{root}"
            )
        if archives:
            raise DataError(f"{root}: no picture, but {shown(archives[0])}; unpack it")
        raise _no_set(root, f"no picture in this folder; accepted are {LAYOUTS}")
    listing = join(list_tar(root / name) for name in shards)
    listing.leave(name for name in names if name not in {*shards, INDEX_FILE})
    return listing


def _no_set(root: Path, reason: str) -> DataError:
    """Return the error about a folder that is no set: what else of ours it is, or the reason."""
    found = describe(root)
    if found.model is None and found.kind not in _OTHERS:
        return DataError(f"{root}: {reason}")
    return DataError(f"{wrong_path(root, 'data', found)}; accepted are {LAYOUTS}")


def _shards(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".tar") and "/" not in name]


def _report(walk: Walk, listing: Listing) -> None:
    """Add what the walk could not use or did not follow."""
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
    listing.leave(f"{name} (a link to a folder that is read already)" for name in walk.not_followed)
