"""Walks a user's folder: lists every regular file below it, each folder once, and opens none.

Links to files and to folders are followed, with three exceptions, so that a walk always ends and
every picture counts once:

- A link to the folder itself or to one above it is not followed.
- A folder that several links lead to, or that is also in the tree itself, is walked once: at its
  place in the tree, otherwise through the first link (shortest path, then alphabetical order).
- What is neither a regular file nor a folder (a broken link, a FIFO, a socket, a device) is never
  opened, and reported.

This is the one place of nsp that lists the insides of folders it did not make.
"""

import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nsp.errors import DataError

MOST_ENTRIES = 20_000_000  # ImageNet-21k has 14 million files
_KINDS = {
    stat.S_IFIFO: "a FIFO, not a file",
    stat.S_IFSOCK: "a socket, not a file",
    stat.S_IFCHR: "a device, not a file",
    stat.S_IFBLK: "a device, not a file",
}


@dataclass
class Walk:
    """The content of a folder, by names relative to it with "/" between the parts.

    Names are as the file system has them: bytes that are not UTF-8 are lone surrogates.
    """

    files: list[str] = field(default_factory=list)  # regular files, sorted
    unusable: list[tuple[str, str]] = field(default_factory=list)  # name and reason, sorted
    not_followed: list[str] = field(default_factory=list)  # links to folders, sorted


def walk_folder(
    root: Path,
    *,
    hidden: bool = False,
    follow_links: bool = True,
    most_entries: int = MOST_ENTRIES,
) -> Walk:
    """Return the content of `root`; hidden files and folders only if `hidden` is set.

    Without `follow_links`, links to folders are not followed (links to files are files either way).
    Raises OSError when `root` itself cannot be listed, and DataError when it has more than
    `most_entries` files and folders. A folder below that cannot be listed is in `unusable`.
    """
    walk = Walk()
    seen = _above(root)
    num_entries = 0
    folders, links = deque([(root, "")]), deque[tuple[Path, str]]()
    while folders or links:
        # Links come after all folders of the tree, so that those keep their own names.
        folder, prefix = folders.popleft() if folders else links.popleft()
        try:
            identity = _identity(folder.stat())
            if identity in seen:
                walk.not_followed.append(prefix.rstrip("/"))
                continue
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise
            reason = f"the folder cannot be listed: {error.strerror}"
            walk.unusable.append((prefix.rstrip("/"), reason))
            continue
        seen.add(identity)
        num_entries += len(entries)
        if num_entries > most_entries:
            raise DataError(
                f"{root} has more than {most_entries:,} files and folders; give the smaller folder "
                "with the files you mean"
            )
        for entry in entries:
            if entry.name.startswith(".") and not hidden:
                continue
            name = prefix + entry.name
            kind = _kind(entry)
            if kind == "folder" and entry.is_symlink():
                if follow_links:
                    links.append((folder / entry.name, f"{name}/"))
                else:
                    walk.not_followed.append(name)
            elif kind == "folder":
                folders.append((folder / entry.name, f"{name}/"))
            elif kind == "file":
                walk.files.append(name)
            else:
                walk.unusable.append((name, kind))
    walk.files.sort()
    walk.unusable.sort()
    walk.not_followed.sort()
    return walk


def files_below(root: Path, *, most_entries: int = MOST_ENTRIES) -> Iterator[Path]:
    """Yield the regular files below `root`, hidden ones too, sorted by their names' parts.

    Links to folders are not followed. Raises as `walk_folder`.
    """
    found = walk_folder(root, hidden=True, follow_links=False, most_entries=most_entries)
    yield from sorted(root / name for name in found.files)


def _above(root: Path) -> set[tuple[int, int]]:
    """Return the folders above `root`; links to them are not followed."""
    found = set()
    for folder in root.resolve().parents:
        with suppress(OSError):  # not readable, so nothing below a link to it could be listed
            found.add(_identity(folder.stat()))
    return found


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _kind(entry: os.DirEntry[str]) -> str:
    """Return "file", "folder", or why it is neither; links are followed."""
    try:
        mode = entry.stat().st_mode
    except FileNotFoundError:
        return "a broken link"
    except OSError as error:  # a link to itself, or through a folder that is not readable
        return f"cannot be read: {error.strerror}"
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "not a file")
