"""Limits: how much of a user's file is read, and how much memory decoding may take at once."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nsp.errors import DataError
from nsp.files import NOT_REGULAR, open_regular

MAX_PICTURE_BYTES = 1 << 30  # of one file: 179 million uncompressed pixels of 6 bytes each
MAX_CAPTION_BYTES = 1_000_000
MEMORY_BYTES = 2 << 30  # for all pictures that a process decodes at the same time


def read_regular(path: Path, *, most_bytes: int, offset: int = 0, num_bytes: int = -1) -> bytes:
    """Return the bytes of a file, or `num_bytes` of them from `offset` on.

    Raises OSError, and DataError with only the reason (no file name) if it is not a regular file
    or longer than `most_bytes`.
    """
    try:
        with open_regular(path) as file:
            whole = os.fstat(file.fileno()).st_size
            size = whole if num_bytes < 0 else num_bytes
            check_size(size, most_bytes)
            file.seek(offset)
            return file.read(min(size, max(0, whole - offset)))
    except OSError as error:
        if error.strerror == NOT_REGULAR:
            raise DataError(NOT_REGULAR) from None
        raise


def check_size(num_bytes: int, most_bytes: int) -> None:
    """Raise DataError with only the reason when something is longer than the limit."""
    if num_bytes > most_bytes:
        raise DataError(f"{num_bytes:,} bytes; at most {most_bytes:,} are allowed")


class ByteBudget:
    """Lets threads reserve bytes up to a limit; a thread that needs more runs alone."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._left = num_bytes
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Wait until so many bytes are free, and reserve them for the block. Do not nest it."""
        wanted = min(num_bytes, self.num_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= wanted)
            self._left -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._left += wanted
                self._changed.notify_all()
