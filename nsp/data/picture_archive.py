"""Archives of pictures as evaluators read them: `arr_0` (N, H, W, 3) uint8 in an .npz file.

Pictures are read and written block by block: 50,000 of 256 px are 9.8 GB. Nothing is ever pickled.
"""

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nsp.errors import DataError, one_line
from nsp.files import open_regular, write_file
from nsp.sniff import explain, sniff

PICTURES = "arr_0"  # the name that np.savez(file, pictures) gives them
MAX_SIDE_PX = 8192
MAX_PICTURES = 2_000_000  # ImageNet has 1.28 million; a small compressed file can have any number
_MAX_BLOCK = 256 << 20  # bytes of pictures in memory at once
_MAX_TEXT = 1 << 20  # bytes of a text beside the pictures
# What zipfile, zlib and NumPy raise for damaged, encrypted or otherwise packed parts.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    OverflowError,
)


@dataclass(frozen=True)
class PictureArchive:
    """The pictures of an .npz file, which stay in the file."""

    path: Path
    shape: tuple[int, int, int, int]  # N, H, W, 3

    def blocks(self, size: int, *, most: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """Yield the pictures, or the first `most`, in blocks (B, H, W, 3) of at most `size`.

        Blocks of very large pictures are smaller, so that one has 256 MiB at most or one picture.
        Raises DataError naming the file if it is damaged.
        """
        num_images = self.shape[0] if most is None else min(most, self.shape[0])
        num_bytes = math.prod(self.shape[1:])
        size = max(1, min(size, _MAX_BLOCK // num_bytes))
        with _part(self.path, PICTURES) as (file, _):
            _read_header(file)
            for start in range(0, num_images, size):
                count = min(size, num_images - start)
                content = bytearray(count * num_bytes)
                if not _filled(file, content):
                    raise ValueError("it ends before its last picture")
                yield np.frombuffer(content, np.uint8).reshape(count, *self.shape[1:])


def _filled(file: IO[bytes], content: bytearray) -> bool:
    """Return whether the file had enough bytes to fill `content`."""
    view, at = memoryview(content), 0
    while at < len(view):
        read = file.read(min(len(view) - at, 1 << 24))
        if not read:
            return False
        view[at : at + len(read)] = read
        at += len(read)
    return True


def open_pictures(path: Path) -> PictureArchive:
    """Return the pictures of an archive, without reading them.

    Raises DataError in one line for a file that is damaged, incomplete or something else, and for
    an array of another type, order or shape.
    """
    with _part(path, PICTURES) as (file, num_bytes):
        shape, dtype = _read_header(file)
        rest = num_bytes - file.tell()
    where = f"{path}: {PICTURES} is {dtype} {shape}"
    if dtype != np.uint8:
        raise DataError(
            f"{where}; pictures must be uint8 numbers from 0 to 255: convert them first"
        )
    sides = shape[1:3]
    if len(shape) != 4 or shape[3] != 3 or not all(1 <= side <= MAX_SIDE_PX for side in sides):
        raise DataError(f"{where}; pictures must be (number, height, width, 3), in RGB")
    if shape[0] < 1:
        raise DataError(f"{where}; there is no picture")
    if math.prod(shape) != rest:
        raise DataError(f"{where}, but the file has {rest:,} bytes of it: it is damaged")
    if shape[0] > MAX_PICTURES:
        raise DataError(f"{where}; an archive has at most {MAX_PICTURES:,} pictures: split it")
    return PictureArchive(path, (shape[0], shape[1], shape[2], 3))


def part_names(path: Path) -> frozenset[str]:
    """Return the names of the arrays in an archive."""
    with _archive(path) as archive:
        return frozenset(name.removesuffix(".npy") for name in archive.namelist())


def read_floats(path: Path, name: str, *, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return an array of an archive as float64; DataError unless it has `shape` and is finite."""
    with _part(path, name) as (file, _):
        found, dtype = _read_header(file)
        if found != shape or dtype.kind != "f":
            raise DataError(f"{path}: {name} is {dtype} {found}; expected float numbers {shape}")
        content = bytearray(math.prod(shape) * dtype.itemsize)
        if not _filled(file, content):
            raise ValueError("it is incomplete")
    array = np.frombuffer(content, dtype).astype(np.float64).reshape(shape)
    if not np.isfinite(array).all():
        raise DataError(f"{path}: {name} contains NaN or infinity")
    return array


def read_text(path: Path, name: str) -> str:
    """Return the text that `write_pictures` put beside the pictures under this name."""
    with _part(path, name, ending="") as (file, num_bytes):
        if num_bytes > _MAX_TEXT:
            raise ValueError("it is too long")
        return file.read(_MAX_TEXT).decode()


def write_pictures(
    path: Path,
    blocks: Iterable[NDArray[np.uint8]],
    *,
    shape: tuple[int, int, int, int],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write blocks of pictures (B, H, W, 3), together of `shape`, as one archive.

    The file appears whole or not at all, and equal pictures give equal bytes. `texts` are further
    parts of the archive, which NumPy's users see as bytes.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with write_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(_entry(f"{PICTURES}.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            written = 0
            for block in blocks:
                assert block.dtype == np.uint8, block.dtype
                assert block.shape[1:] == shape[1:], (block.shape, shape)
                file.write(np.ascontiguousarray(block).data)
                written += len(block)
            assert written == shape[0], (written, shape)
        for name, text in (texts or {}).items():
            archive.writestr(_entry(name), text)


def _entry(name: str) -> zipfile.ZipInfo:
    """Return the entry of a part: always of the same date, readable for all who may read."""
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o644 << 16
    return entry


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Yield an open .npz file; whatever damage the block finds is a DataError naming the file."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except _DAMAGE as error:
        found = sniff(path)
        if found.is_spoilt or found.kind not in ("zip", "torch"):
            raise DataError(explain(path, expected="an .npz archive", found=found)) from error
        why = one_line(str(error)) or type(error).__name__
        raise DataError(f"{path} is damaged ({why}); copy it again") from error


@contextmanager
def _part(path: Path, name: str, *, ending: str = ".npy") -> Iterator[tuple[IO[bytes], int]]:
    """Yield an open part of an .npz file and its length in bytes."""
    with _archive(path) as archive:
        if f"{name}{ending}" not in archive.namelist():
            known = ", ".join(each.removesuffix(".npy") for each in archive.namelist()[:8])
            raise DataError(f"{path} has no array {name}; it has {known or 'nothing'}")
        with archive.open(f"{name}{ending}") as file:
            yield file, archive.getinfo(f"{name}{ending}").file_size


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of the array that follows; ValueError for one in Fortran order."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format is not read")
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[version[0]](file)
    if fortran and len(shape) > 1:
        raise ValueError("an array is in Fortran order; save np.ascontiguousarray(array)")
    return shape, dtype
