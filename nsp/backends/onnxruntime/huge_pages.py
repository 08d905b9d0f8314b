"""Large pages for the memory of sessions: weights that are read for every step are found sooner.

A matrix product with few rows reads each weight once. With pages of 4 KiB the processor looks up
one address in a thousand values, with pages of 2 MiB none. Linux makes large pages on its own only
where its setting says "always"; from version 6.1 on a program may ask for them (madvise(2),
MADV_COLLAPSE). What the memory holds does not change.
"""

import ctypes
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

_MADV_COLLAPSE = 25
_PAGE = 2 << 20
_MAPS = Path("/proc/self/maps")
# Private and writable, without a file: start, end.
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0\s*(?:\[heap\])?\n")


def own_memory() -> list[range]:
    """Return the address ranges of this process that hold no file; empty on other systems."""
    if sys.platform != "linux":
        return []
    try:
        lines = _MAPS.read_text().splitlines(keepends=True)
    except OSError:
        return []
    found = filter(None, map(_ANONYMOUS.fullmatch, lines))
    return [range(int(match[1], 16), int(match[2], 16)) for match in found]


def collapse(before: Sequence[range]) -> int:
    """Put the memory that is new since `before` on large pages; return how many there are now.

    It copies this memory once: 0.1 s for 150 MB. A system that cannot do it is left as it is.
    """
    if not (now := own_memory()):
        return 0
    libc, done = ctypes.CDLL(None), 0
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start in _new_pages(before, now):
        done += libc.madvise(start, _PAGE, _MADV_COLLAPSE) == 0
    logger.debug("onnxruntime: %d MiB on large pages", done * _PAGE >> 20)
    return done


def _new_pages(before: Sequence[range], now: Sequence[range]) -> Iterator[int]:
    """Yield the address of every whole large page of `now` that was not there before."""
    old = sorted(before, key=lambda each: each.start)
    for region in now:
        start = -(-region.start // _PAGE) * _PAGE
        for page in range(start, region.stop - _PAGE + 1, _PAGE):
            if not any(each.start < page + _PAGE and page < each.stop for each in old):
                yield page
