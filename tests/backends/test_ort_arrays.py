"""What device arrays promise: views that are arithmetic on addresses, bound where they lie.

ONNX Runtime's host memory stands in for a GPU's; blocks, addresses and bindings are the same.
"""

import copy
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsp.backends.onnxruntime.ort_arrays import DeviceMemory
from nsp.backends.onnxruntime.ort_backend import OnnxRuntimeBackend
from nsp.backends.onnxruntime.ort_cuda import (
    CPU,
    CUDA,
    MAX_GRAPHS,
    NO_GRAPH,
    CudaGraphs,
    with_options,
)
from nsp.errors import BackendError, EngineError, FeedError
from nsp.stage.arena import KVShape
from tests.backends.onnx_stages import write_model
from tests.backends.test_onnxruntime import ADD_IO, step_backend

MEMORY = DeviceMemory(onnxruntime, "cpu", (RuntimeError,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def on_device(backend: OnnxRuntimeBackend) -> OnnxRuntimeBackend:
    moved = copy.copy(backend)
    moved.memory = MEMORY
    return moved


@given(
    rows=st.integers(0, 6),
    start=st.integers(0, 6),
    stop=st.integers(0, 6),
    dtype=st.sampled_from(["float32", "float16", "int64", "bool"]),
)
@settings(deadline=None)
def test_a_view_is_that_of_numpy(rows: int, start: int, stop: int, dtype: str) -> None:
    host = (np.arange(rows * 6).reshape(rows, 2, 3) % 5).astype(dtype)
    device, expected = MEMORY.upload(host)[start:stop], host[start:stop]
    assert (device.shape, device.dtype, device.nbytes) == (
        expected.shape,
        expected.dtype,
        expected.nbytes,
    )
    np.testing.assert_array_equal(MEMORY.download(device), expected)
    flat = device.reshape((expected.size,))
    np.testing.assert_array_equal(MEMORY.download(flat), expected.reshape(-1))
    assert device.address == flat.address != 0


def test_addresses_follow_offsets_and_empty_arrays_have_one() -> None:
    array = MEMORY.allocate((8, 3, 4), "float16")
    assert array[2:].address == array.address + 2 * 3 * 4 * 2
    assert array[:0].address == array.address
    assert array[5:5].address == array.address + 5 * 24
    assert MEMORY.allocate((0, 4), "float32").address != 0
    assert MEMORY.upload(np.zeros((0, 4), np.int64)).address != 0


def test_what_is_no_view_is_refused() -> None:
    array = MEMORY.allocate((4, 2), "float32")
    with pytest.raises(IndexError, match="no views with a step"):
        array[::2]
    with pytest.raises(ValueError, match=r"shape \(4, 2\) cannot be viewed as \(3, 3\)"):
        array.reshape((3, 3))


def test_a_view_keeps_its_block_alive_and_uploads_are_copies() -> None:
    host = np.arange(4.0)
    view = MEMORY.upload(host)[2:]
    host[:] = -1
    MEMORY.upload(np.zeros(4))
    np.testing.assert_array_equal(MEMORY.download(view), [2, 3])
    assert MEMORY.download(MEMORY.upload(np.array(1.5, np.float32))).shape == ()


def test_the_first_rows_are_copied_into_a_part_of_another_block() -> None:
    source = MEMORY.upload(np.arange(24.0, dtype=np.float32).reshape(2, 4, 3))
    block = MEMORY.upload(np.full((5, 2, 3), -1, np.float32))
    MEMORY.copy_rows(source, block[1:3])
    expected = np.full((5, 2, 3), -1, np.float32)
    expected[1:3] = np.arange(24).reshape(2, 4, 3)[:, :2]
    np.testing.assert_array_equal(MEMORY.download(block), expected)


def test_too_little_memory_says_what_to_do() -> None:
    with pytest.raises(BackendError, match=r"out of memory.*--batch-size") as caught:
        MEMORY.allocate((1 << 50,), "float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kv_layout", ["delta", "present"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_cache_grows_on_the_device_from_an_empty_past(
    folder: Path, dtype: str, kv_layout: str
) -> None:
    host = step_backend(folder, dtype, kv_layout)
    device = on_device(host)
    schedule = (1, 4, 2)
    arenas = [b.new_arena(KVShape(1, sum(schedule), 3, 2, 8, dtype)) for b in (host, device)]
    for length in schedule:
        x = np.random.default_rng(length).integers(-9, 9, (length, 3, 2, 8)).astype(dtype)
        expected, given = (
            b.run("step", {"x": b.upload(x), **arena.past()}, arena.new(length))
            for b, arena in zip((host, device), arenas, strict=True)
        )
        for name, array in expected.items():
            np.testing.assert_array_equal(device.download(given[name]), array)
        for arena in arenas:
            arena.advance(length)
    for name, array in arenas[0].past().items():
        np.testing.assert_array_equal(device.download(arenas[1].past()[name]), array)


def test_a_place_that_does_not_fit_is_named(folder: Path) -> None:
    from onnx import helper

    path = write_model(folder / "add.onnx", ADD_IO, [helper.make_node("Add", ["a", "b"], ["sum"])])
    plain = OnnxRuntimeBackend({"add": path}, {"add": ADD_IO}, kv_layout="delta", num_threads=1)
    backend = on_device(plain)
    feeds = {name: backend.upload(np.ones(3, np.float32)) for name in "ab"}
    with pytest.raises(FeedError, match=r"array for sum is float16 .* expected float32"):
        backend.run("add", feeds, {"sum": backend.allocate((3,), "float16")})
    room = backend.upload(np.full(8, -1, np.float32))
    backend.run("add", feeds, {"sum": room[4:7]})
    np.testing.assert_array_equal(backend.download(room), [-1, -1, -1, -1, 2, 2, 2, -1])


def test_a_graph_is_replayed_only_for_the_same_places() -> None:
    graphs = CudaGraphs(onnxruntime)
    block = MEMORY.allocate((8, 4), "float32")
    first = graphs.number("step", [block[:2], block[2:4]])
    assert first != graphs.number("step", [block[:2], block[4:6]])
    assert first != graphs.number("step", [block[:2].reshape((4, 2)), block[2:4]])
    assert first == graphs.number("step", [block[:2], block[2:4]]) > 0
    options = graphs.run_options("step", [block[:2], block[2:4]])
    assert options.get_run_config_entry("gpu_graph_id") == str(first)


def test_arrays_without_steady_places_are_not_captured_without_end() -> None:
    graphs, block = CudaGraphs(onnxruntime), MEMORY.allocate((MAX_GRAPHS + 1,), "float32")
    numbers = [graphs.number("step", [block[i : i + 1]]) for i in range(MAX_GRAPHS + 1)]
    assert numbers == [*range(1, MAX_GRAPHS + 1), NO_GRAPH]
    graphs.leave_out("select")
    assert graphs.number("select", [block]) == NO_GRAPH


def test_a_stage_that_cannot_be_captured_runs_without_a_graph(caplog: Any) -> None:
    """The CUDA provider refuses a model of which a part runs on the CPU when it is loaded."""
    backend = OnnxRuntimeBackend({}, {}, kv_layout="delta")
    backend.providers, backend._graphs = (CUDA, CPU), CudaGraphs(onnxruntime)
    asked = []

    def session(path: Path, options: Any, providers: list[Any]) -> str:
        asked.append(providers[0][1]["enable_cuda_graph"])
        if asked[-1] == "1":
            raise RuntimeError("This session cannot use the graph capture feature")
        return "a session"

    backend._ort = types.SimpleNamespace(InferenceSession=session)
    with caplog.at_level("INFO"):
        assert backend._new_session("select", Path("model.onnx"), None) == "a session"
    assert asked == ["1", "0"]
    assert "no CUDA graph of select: This session cannot" in caplog.text
    assert backend._graphs.number("select", []) == NO_GRAPH


def test_cuda_gets_its_options_and_the_cpu_none() -> None:
    (name, options), cpu = with_options((CUDA, CPU), graphs=False)
    assert (name, cpu) == (CUDA, CPU)
    assert options["use_tf32"] == "0"
    assert set(options.values()) >= {"0"}


def test_other_failures_to_load_are_still_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    backend = OnnxRuntimeBackend({"add": path}, {"add": ADD_IO}, kv_layout="delta")
    with pytest.raises(EngineError, match="cannot be loaded"):
        backend.wait()
