"""Writes tars that depend on their members alone, and walks them; a cut one is no shorter one.

Python's tarfile takes a header that is missing, cut or damaged for the end of the archive. Its real
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

_MAX_EXTENDED = 1 << 20  # bytes of a header that holds a long name or such; it is read as a whole
_MAX_MEMBER = 1 << 36  # bytes; what a cut stream still claims is counted through in blocks
_EXTENDED_TYPES = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
    | {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)


class _CheckedTarInfo(tarfile.TarInfo):
    """A member whose header is whole and claims nothing that could not be."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Return the next member; ReadError where its headers are no such, extended ones too."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed does not know it
            raise
        except (tarfile.HeaderError, ValueError, OverflowError, RecursionError) as error:
            raise tarfile.ReadError(f"damaged ({error})") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the member of a header block; ReadError unless it is one or the real end."""
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
        """Raise ReadError: what the map of such a member claims has no bounds."""
        raise tarfile.ReadError("a sparse member; make the tar without --sparse")

    # What Python's tarfile asks to read the three forms of such a map in an extended header.
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def _check_size(num_bytes: int, most_bytes: int, what: str) -> None:
    if not 0 <= num_bytes <= most_bytes:
        raise tarfile.ReadError(
            f"damaged ({what} of {num_bytes:,} bytes; at most {most_bytes:,} are read)"
        )


def open_tar(stream: IO[bytes], *, seekable: bool) -> tarfile.TarFile:
    """Return an uncompressed tar open for `walk`; raises tarfile.TarError or OSError.

    What is not `seekable` must have each member read before the next one is asked for.
    """
    mode: Literal["r:", "r|"] = "r:" if seekable else "r|"
    return tarfile.open(fileobj=stream, mode=mode, tarinfo=_CheckedTarInfo)


def walk(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files; raises tarfile.TarError or OSError where the tar is not whole.

    Raises DataError for a held-out list that is a link or a folder, and so holds out nothing.
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
                f"{member.name} in {where} is no regular file, so that what it "
                "holds out is not known; pack the tar again with the file itself"
            )


def write_members(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write an uncompressed tar whose bytes depend on names and contents alone."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)  # mtime, owner and group stay 0
            header.size = len(content)
            header.mode = 0o644
            archive.addfile(header, io.BytesIO(content))
