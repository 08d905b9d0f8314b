"""Writes tars whose bytes depend only on their members, and reads them; a cut tar is an error.

Python's tarfile treats a header that is missing, cut or damaged as the end of the archive. The real
end is a block of zeros.
"""

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Literal, Self

from nsp.data.heldout import is_heldout
from nsp.errors import DataError

_MAX_EXTENDED = 1 << 20  # bytes of an extended header (long names), which is read at once
_MAX_MEMBER = 1 << 36  # bytes; in a cut stream, the claimed size is read block by block
_EXTENDED_TYPES = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
    | {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)


class _CheckedTarInfo(tarfile.TarInfo):
    """A member with a complete header and possible values in it."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Return the next member; ReadError if its headers, also extended ones, are invalid."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed does not know it
            raise
        except (tarfile.HeaderError, ValueError, OverflowError, RecursionError) as error:
            raise tarfile.ReadError(f"damaged ({error})") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the member of a header block; ReadError unless it is valid or the real end."""
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            cut = len(buf) < tarfile.BLOCKSIZE
            reason = "cut before its end" if cut else f"damaged ({error})"
            raise tarfile.ReadError(reason) from error
        if member.type == tarfile.GNUTYPE_SPARSE:
            member._refuse_sparse()
        if member.type in _EXTENDED_TYPES:
            _check_size(member.size, _MAX_EXTENDED, "an extended header")
        return member

    def _refuse_sparse(self, *_: object) -> None:
        """Raise ReadError: the map of a sparse member may claim any size."""
        raise tarfile.ReadError("a sparse member; make the tar without --sparse")

    # Python's tarfile calls these to read the three forms of such a map in an extended header.
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def _check_size(num_bytes: int, most_bytes: int, what: str) -> None:
    if not 0 <= num_bytes <= most_bytes:
        raise tarfile.ReadError(
            f"damaged ({what} of {num_bytes:,} bytes; at most {most_bytes:,} are allowed)"
        )


def open_tar(stream: IO[bytes], *, seekable: bool) -> tarfile.TarFile:
    """Return an uncompressed tar open for `walk`; raises tarfile.TarError or OSError.

    If it is not `seekable`, each member must be read before the next one is requested.
    """
    mode: Literal["r:", "r|"] = "r:" if seekable else "r|"
    return tarfile.open(fileobj=stream, mode=mode, tarinfo=_CheckedTarInfo)


def walk(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files; raises tarfile.TarError or OSError if the tar is incomplete.

    Raises DataError for a held-out list that is a link or a folder and therefore has no content.
    """
    while (member := archive.next()) is not None:
        _check_size(member.size, _MAX_MEMBER, "a member")
        # A shard's members would pile up in this list, which typeshed does not know.
        archive.members.clear()  # type: ignore[attr-defined]
        if member.isreg():
            yield member
        elif is_heldout(member.name):
            where = os.fsdecode(archive.name or "the tar")
            raise DataError(
                f"{member.name} in {where} is not a regular file, so the held-out "
                "samples are unknown; pack the tar again with the file itself"
            )


def write_members(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write an uncompressed tar whose bytes depend only on names and contents."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)  # mtime, owner and group stay 0
            header.size = len(content)
            header.mode = 0o644
            archive.addfile(header, io.BytesIO(content))
