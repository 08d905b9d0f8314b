"""Walks a tar member by member; one that is cut or damaged anywhere is an error, not a shorter tar.

Python's tarfile takes a header that is missing, cut or damaged for the end of the archive. Its real
end is a block of zeros.
"""

import tarfile
from collections.abc import Iterator
from typing import IO, Literal, Self


class _CheckedTarInfo(tarfile.TarInfo):
    """A member whose header is whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the member of a header block; ReadError unless it is one or the real end."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            cut = len(buf) < tarfile.BLOCKSIZE
            reason = "cut before its end" if cut else f"damaged ({error})"
            raise tarfile.ReadError(reason) from error


def open_tar(stream: IO[bytes], *, seekable: bool) -> tarfile.TarFile:
    """Return an uncompressed tar open for `walk`; raises tarfile.TarError or OSError.

    What is not `seekable` must have each member read before the next one is asked for.
    """
    mode: Literal["r:", "r|"] = "r:" if seekable else "r|"
    return tarfile.open(fileobj=stream, mode=mode, tarinfo=_CheckedTarInfo)


def walk(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files; raises tarfile.TarError or OSError where the tar is not whole."""
    while (member := archive.next()) is not None:
        # A shard's members would pile up in this list, which typeshed does not know.
        archive.members.clear()  # type: ignore[attr-defined]
        if member.isreg():
            yield member
