"""Memory of sessions on large pages."""

import re
from pathlib import Path

import numpy as np
import pytest

from nsp.backends.onnxruntime import ort_session
from nsp.backends.onnxruntime.ort_backend import CPU, OnnxRuntimeBackend
from nsp.backends.onnxruntime.ort_session import collapse, own_memory

_MIB = 1 << 20


def _large_kib() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"AnonHugePages:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1])


@pytest.mark.skipif(not own_memory(), reason="this system does not show a process its memory")
def test_new_memory_gets_large_pages_and_keeps_its_content() -> None:
    before, large = own_memory(), _large_kib()
    content = np.arange(8 * _MIB, dtype=np.int64)  # 64 MiB
    done = collapse(before)
    if not done:
        pytest.skip("this kernel does not make large pages on demand (Linux 6.1 does)")
    assert done >= 28
    assert _large_kib() - large >= 48 * 1024 or large >= 48 * 1024
    assert np.array_equal(content, np.arange(8 * _MIB, dtype=np.int64))


def test_memory_that_was_there_before_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    page = 2 * _MIB
    now = [range(0, 10 * page), range(20 * page + 1, 23 * page)]
    before = [range(page, 3 * page), range(8 * page + 5, 9 * page)]
    found = [each // page for each in ort_session._new_pages(before, now)]
    assert found == [0, 3, 4, 5, 6, 7, 9, 21, 22]


def test_a_system_without_the_list_of_memory_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_session, "_MAPS", Path("/does/not/exist"))
    assert own_memory() == []
    assert collapse([]) == 0


def test_weights_get_large_pages_once_and_not_for_a_single_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[object] = []
    monkeypatch.setattr("nsp.backends.onnxruntime.ort_backend.own_memory", lambda: [range(9)])
    monkeypatch.setattr("nsp.backends.onnxruntime.ort_backend.collapse", made.append)
    backend = OnnxRuntimeBackend({}, {}, kv_layout="delta", providers=(CPU,))
    for expected in (0, 1, 1):
        assert list(backend.play("steps", {}, lambda *_: iter([1]))) == [1]
        assert len(made) == expected
