"""How the sessions of the `onnxruntime` backend share a processor's cores and memory."""

import ctypes
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_MADV_COLLAPSE = 25
_PAGE = 2 << 20
_MAPS = Path("/proc/self/maps")
# Private and writable, without a file: start, end.
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0\s*(?:\[heap\])?\n")

_ENTRIES = {
    # Waiting workers spin for 20 us, the time between two operators (an image of w512 then takes
    # 3 % less, its small scales 8 %), but not after the run. Spinning during the next stage's run
    # made an image take 6 times as long on two busy cores; 1 ms within the run, 1.1 to 1.3 times.
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "20",
    "session.force_spinning_stop": "1",
    "session.use_env_allocators": "1",
}


def session_options(ort: Any, num_threads: int) -> Any:
    """Return the options of a stage's session."""
    _share_scratch(ort)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1  # stages are chains without parallel operators
    for name, value in _ENTRIES.items():
        options.add_session_config_entry(name, value)
    # Failures are raised by the backend; ONNX Runtime would also print them.
    options.log_severity_level = 2 if logger.isEnabledFor(logging.DEBUG) else 4
    return options


@cache
def _share_scratch(ort: Any) -> None:
    """Create one pool of scratch memory on the host for all sessions of this process.

    Stages run one after the other; with separate pools, one image of w512 took 50 MiB more.
    """
    place = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(place, None)


def own_memory() -> list[range]:
    """Return the address ranges of this process without a file behind them; empty elsewhere."""
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

    A matrix product with few rows reads each weight once. With pages of 4 KiB the processor looks
    up one address in a thousand values, with pages of 2 MiB none. Linux makes large pages on its
    own only where its setting says "always"; from version 6.1 on a program may ask for them
    (madvise(2), MADV_COLLAPSE). It copies this memory once: 0.1 s for 150 MB. What the memory holds
    does not change, and a system that cannot do it is left as it is.
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
