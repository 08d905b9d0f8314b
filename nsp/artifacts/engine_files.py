"""The files of an engine folder, checked, and locked from reading the manifest to their use.

An export removes folders that neither of the last two manifests names. A reader locks the folders
that it will load from (a shared lock; an export skips locked folders), so that it loads the files
that it verified, however long that takes. On a file system without locks, a folder can disappear
during reading; the caller then reads the manifest again.
"""

import errno
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from nsp.cores import usable_cores
from nsp.errors import EngineError
from nsp.files import inside, open_regular
from nsp.sniff import explain, sniff

logger = logging.getLogger(__name__)

_READ_BY_NAME = "tokenizer/"  # in this folder, unlisted files have no effect
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class MissingFileError(EngineError):
    """A listed file is missing: lost, or replaced since the manifest was read."""


class SpoiltFileError(EngineError):
    """A listed file is a pointer, a page or cut; the message says how to get the file itself."""


class HeldFiles:
    """Listed files of an engine folder; no export removes them until `release`."""

    def __init__(self, folder: Path, digests: Mapping[str, str]) -> None:
        """Lock the folders of `digests` ({name: SHA-256}), and check that each file exists.

        Raises MissingFileError for a missing file, EngineError for one that is a link, is not a
        regular file or is not readable.
        """
        self.folder, self.digests = folder, digests
        self._handles: list[int] = []
        self._lock = threading.Lock()
        try:
            for name in dict.fromkeys(name.rpartition("/")[0] for name in digests):
                self._handles.append(_hold(folder, name))
            for name in digests:
                with _readable(folder, name) as path, open_regular(path, follow_link=False):
                    pass
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the folders."""
        self.release()

    def __del__(self) -> None:
        """Release the folders."""
        self.release()

    def release(self) -> None:
        """Release the folders; a second call has no effect."""
        with self._lock:
            handles, self._handles = self._handles, []
        for handle in handles:
            os.close(handle)

    def verify(self) -> None:
        """Raise EngineError naming the first file that is not of its recorded SHA-256.

        Also for a file beside an engine that is not listed: a graph can name its weights' files.
        Every byte is read: 40 MB take 30 ms, and about 1 s per 1.5 GB and core.
        """
        start = time.perf_counter()
        self._refuse_unlisted()
        with ThreadPoolExecutor(usable_cores()) as pool:  # hashing releases the interpreter lock
            for _ in pool.map(lambda item: check_file(self.folder, *item), self.digests.items()):
                pass
        seconds = time.perf_counter() - start
        logger.info("%s: %d files verified in %.2f s", self.folder, len(self.digests), seconds)

    def _refuse_unlisted(self) -> None:
        """Raise EngineError for a file beside an engine that the manifest does not list."""
        for name in {name.rpartition("/")[0] for name in self.digests}:
            if name.startswith(_READ_BY_NAME):
                continue
            with _readable(self.folder, name) as folder:
                others = {path.name for path in folder.iterdir()}
            others -= {each.rpartition("/")[2] for each in self.digests if each.startswith(name)}
            if others:
                path = self.folder / name / min(others)
                raise EngineError(f"{path} is not listed in the manifest; remove it")


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise EngineError naming the first file that is missing or not of its recorded SHA-256."""
    for name, digest in digests.items():
        check_file(folder, name, digest)


def check_file(folder: Path, name: str, digest: str) -> None:
    """Raise EngineError when a file is missing, linked, unreadable, or not of its SHA-256."""
    with _readable(folder, name) as path, open_regular(path, follow_link=False) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        what = sniff(folder / name)
        if what.is_spoilt:
            raise SpoiltFileError(explain(folder / name, expected="an engine's file", found=what))
        raise EngineError(f"{folder / name} differs from what was exported (SHA-256)")


@contextmanager
def _readable(folder: Path, name: str) -> Iterator[Path]:
    """Yield where a listed file or folder lies; EngineError where the block cannot read it."""
    try:
        yield inside(folder, name)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"{folder / name} is missing though the manifest lists it") from None
    except ValueError as error:
        raise EngineError(f"{folder / name} {error}") from None
    except PermissionError:
        raise EngineError(f"{folder / name} may not be read: there is no permission") from None
    except OSError as error:
        raise EngineError(f"{folder / name} cannot be read ({error.strerror})") from error


def _hold(folder: Path, name: str) -> int:
    """Return a descriptor of a folder of files, with a shared lock on it."""
    with _readable(folder, name) as path:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _lock(handle, fcntl.LOCK_SH) or _is_gone(handle, folder / name):
            raise MissingFileError(f"{folder / name} is missing though the manifest lists it")
    except BaseException:
        os.close(handle)
        raise
    return handle


def _lock(handle: int, kind: int) -> bool:
    """Return whether a lock was had; True also where the file system has none."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_gone(handle: int, path: Path) -> bool:
    """Return whether the folder was removed between its opening and its locking."""
    try:
        here, held = path.stat(), os.fstat(handle)
    except FileNotFoundError:
        return True
    return (here.st_dev, here.st_ino) != (held.st_dev, held.st_ino)


@contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Yield whether nobody is loading from a folder of files; nobody begins to in the block."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield _lock(handle, fcntl.LOCK_EX)
    finally:
        os.close(handle)
