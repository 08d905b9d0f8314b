"""Selects the recorded calls that an engine folder keeps, few enough for a small file.

Of many similar calls the first, one for each span of sizes and the last are compared; from the
others only the cache's part is kept. So a loop of a thousand steps needs little more space than one
of ten.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from nsp.export.proof.recorded import Call, Recording, array_key

logger = logging.getLogger(__name__)

MOST_BYTES = 50 * 10**6


def kept(recordings: Sequence[Recording], *, most_bytes: int = MOST_BYTES) -> list[Recording]:
    """Return recordings with the selected calls, at least one for every stage.

    A stage is compared in the first recording that calls it. If the arrays need more than
    `most_bytes`, the largest calls of stages with several calls are left out.
    """
    compared, keys = _chosen(recordings), dict[int, str]()
    found = _thin(recordings, compared)
    while _num_bytes(found, keys) > most_bytes:
        count = Counter(call.stage for call in compared.values())
        spare = [call for call in compared.values() if count[call.stage] > 1]
        if not spare:
            size = _num_bytes(found, keys) / 1e6
            logger.warning("one call of every stage takes %.0f MB in the engine folder", size)
            break
        del compared[id(max(spare, key=lambda call: sum(a.nbytes for a in _arrays(call))))]
        found = _thin(recordings, compared)
    return found


def _chosen(recordings: Sequence[Recording]) -> dict[int, Call]:
    """Return by identity the calls to compare: for each stage one per span, and the last."""
    chosen, seen = dict[int, Call](), set[str]()
    for recording in recordings:
        unseen = [call for call in recording.calls if call.stage not in seen]
        last = {call.stage: call for call in unseen}
        spans = {_span(call): call for call in reversed(unseen)}  # the first of each
        chosen |= {id(call): call for call in (*spans.values(), *last.values())}
        seen |= last.keys()
    return chosen


def _span(call: Call) -> tuple[object, ...]:
    return call.stage, *(array.shape for array in call.feeds.values())


def _thin(recordings: Sequence[Recording], compared: Mapping[int, Call]) -> list[Recording]:
    """Return the recordings without arrays that are neither compared nor needed by a cache."""
    found = []
    for recording in recordings:
        here = {call.stage for call in recording.calls if id(call) in compared}
        calls = []
        for call in recording.calls:
            if id(call) in compared:
                calls.append(call)
            elif here and call.new:  # for a shared cache, the added part is enough
                calls.append(replace(call, feeds={}, outputs=call.new, is_compared=False))
            elif call.num_new and not recording.has_cache and call.stage in here:
                # A stage with its own cache repeats all its calls.
                calls.append(replace(call, outputs={}, is_compared=False))
        if here:
            found.append(replace(recording, calls=tuple(calls)))
    return found


def _arrays(call: Call) -> list[NDArray[Any]]:
    return [*call.feeds.values(), *call.outputs.values()]


def _num_bytes(recordings: Sequence[Recording], keys: dict[int, str]) -> int:
    """Return the bytes of the arrays, equal ones counted once; `keys` has their digests."""
    sizes = {}
    for array in (a for each in recordings for call in each.calls for a in _arrays(call)):
        if id(array) not in keys:
            keys[id(array)] = array_key(array)
        sizes[keys[id(array)]] = array.nbytes
    return sum(sizes.values())
