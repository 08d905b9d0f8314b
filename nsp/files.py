"""How files are read and written: damaged JSON is explained; results are complete or absent.

A folder from somebody else may be an attack: `inside` and `locked_file` never lead out of it.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.errors import ConfigError, one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

NOT_REGULAR = "not a regular file"
_MAX_JSON_DEPTH = 64  # ours have about ten levels; Python functions give up at a thousand
_MAX_JSON = 256 << 20  # bytes; a manifest has 100 KB
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a UTF-8 file.

    Raises ValueError with the reason in one line for anything else, also for an object nested
    deeper than a program can walk; the caller adds which file it is and what to do.
    """
    with open_regular(path) as file:
        content = file.read(_MAX_JSON + 1)
    if len(content) > _MAX_JSON:
        raise ValueError(f"larger than {_MAX_JSON >> 20} MiB")
    values = parse_json(content.decode("utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"a JSON {type(values).__name__} instead of an object")
    json.dumps(values, ensure_ascii=False).encode()  # lone surrogates could not be shown
    return values


@contextmanager
def open_regular(path: Path, *, follow_link: bool = True) -> Iterator[io.BufferedReader]:
    """Yield a regular file, open for reading.

    Raises OSError, also if it is not a regular file: a pipe would block, a device has no end.
    """
    # Not blocking: since the check, the file may have been replaced by a pipe.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_link else os.O_NOFOLLOW)
    handle = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON text; raises ValueError with the reason, like `read_json`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    level = [value]
    for _ in range(_MAX_JSON_DEPTH + 1):
        level = [child for inside in level for child in _children(inside)]
    if level:
        raise ValueError(f"nested deeper than {_MAX_JSON_DEPTH} levels")
    return value


def _children(value: Any) -> list[Any]:
    """Return the lists and objects directly inside a value."""
    if not isinstance(value, dict | list):
        return []
    inside = value.values() if isinstance(value, dict) else value
    return [child for child in inside if isinstance(child, dict | list)]


def name_problem(path: Path) -> str | None:
    """Return why other programs cannot open a path, or None if they can.

    ONNX Runtime and safetensors take paths as UTF-8; names in Latin-1 are common in old folders and
    on network drives.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return (
            "has a name that is not UTF-8, which ONNX Runtime and safetensors cannot open; "
            "rename the folder"
        )
    return None


def inside(folder: Path, name: str) -> Path:
    """Return folder / name, where `name` (relative, with "/") stays inside that folder.

    Raises ValueError with the reason for an absolute name, for one with parts such as `..`, and for
    one that passes through a symbolic link: it could lead to the files of somebody else. The path
    of the folder itself may contain links.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError("leads outside the folder")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ValueError("is a symbolic link, or is behind one; copy the files themselves")
    return path


def read_array(path: Path) -> "NDArray[Any]":
    """Return the array in an .npy file; ConfigError if it is none, or not one of numbers."""
    import numpy as np

    try:  # mapped first: a header that promises more than the file has allocates nothing
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            return np.array(found)
        found.close()
        problem = "it is an archive of arrays"
    except (OSError, ValueError, EOFError) as error:
        problem = one_line(str(error))
    raise ConfigError(f"{path} is not an .npy file with one array of numbers ({problem})")


@contextmanager
def locked_file(path: Path) -> Iterator[bool]:
    """Yield whether this process has the lock of `path`; it keeps the lock until the block ends.

    A missing file is created; the content of an existing one stays. Raises OSError when it cannot
    be opened, also when it is a link or not a regular file: a lock in a folder of somebody else
    must not touch other files.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file, so it cannot be a lock", str(path))
        held = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(handle)


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` when the block ends without an error.

    After an error the new folder is removed and `folder` is as it was. Raises OSError naming a
    file that cannot be written, or `folder` itself if it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _make_partial(folder)
    old = partial.with_name(partial.name + ".old")
    try:
        with name_failed_write(folder, partial):
            yield partial
            partial.chmod(0o755)
            if folder.exists():
                os.rename(folder, old)
            os.rename(partial, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _make_partial(folder: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:  # the error names a temporary folder that the user does not know
        raise OSError(error.errno, error.strerror, str(folder)) from error


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Yield a path whose file becomes `path` when the block ends without an error.

    After an error the new file is removed. Raises OSError naming `path` when it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name, so that nobody can have put a link there.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with name_failed_write(path, partial):
            mode = _create(partial)
            yield partial
            partial.chmod(mode)  # safetensors replaces the file by one that only the owner can read
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _create(path: Path) -> int:
    """Create a new empty file, and return its mode, as the umask allows it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


@contextmanager
def name_failed_write(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Turn a failed write in the block into an OSError that names `path`.

    When the disk is full, Python names no file and safetensors raises an error of its own; neither
    knows that `partial` is only the temporary name of `path`.
    """
    try:
        yield
    except Exception as error:
        number, named = _failed_write(error)
        if number is None:
            raise
        where = path
        if named is not None:
            if partial is None or not named.is_relative_to(partial):
                raise  # the error is about another file
            where = path / named.relative_to(partial)
        raise OSError(number, os.strerror(number), str(where)) from error


def _failed_write(error: Exception) -> tuple[int | None, Path | None]:
    """Return the errno of a failed write and the file it names; no errno for other errors."""
    from safetensors import SafetensorError

    if isinstance(error, OSError) and (error.filename or error.errno in _DISK_ERRORS):
        return error.errno, Path(str(error.filename)) if error.filename else None
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)\)", str(error))):
        return int(found[1]), None
    return None, None


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
