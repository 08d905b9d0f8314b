"""What the onnxruntime backend promises: the caller's arrays, no copies, one line per failure."""

import sys
import types
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nsp.backends.onnxruntime.ort_backend import CPU, CUDA, OnnxRuntimeBackend, choose_providers
from nsp.errors import BackendError, ConfigError, EngineError, FeedError
from nsp.stage.arena import KVShape
from nsp.stage.io import Axes, StageIO
from tests.backends.onnx_stages import write_hollow_model, write_model


def step_io(dtype: str, kv_layout: str) -> StageIO:
    past = {"delta": "P G 2 8", "present": "G 2 P 8"}[kv_layout]
    new = {"delta": "L G 2 8", "present": "G 2 P+L 8"}[kv_layout]
    return StageIO(
        inputs={
            "x": Axes("L G 2 8", dtype),
            "past_k_0": Axes(past, dtype),
            "past_v_0": Axes(past, dtype),
        },
        outputs={
            "total": Axes("G 2 8", dtype),
            "new_k_0": Axes(new, dtype),
            "new_v_0": Axes(new, dtype),
        },
    )


def step_nodes(kv_layout: str) -> list[onnx.NodeProto]:
    """Keys 2x, values -x; the result is the sum over the keys of the past."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["k"]),
        helper.make_node("Neg", ["x"], ["v"]),
        helper.make_node("Constant", [], ["axis"], value_ints=[0 if kv_layout == "delta" else 2]),
        helper.make_node("ReduceSum", ["past_k_0", "axis"], ["total"], keepdims=0),
    ]
    for kind in ("k", "v"):
        if kv_layout == "delta":
            nodes.append(helper.make_node("Identity", [kind], [f"new_{kind}_0"]))
            continue
        joined = [f"past_{kind}_0", f"{kind}_GHLK"]
        nodes += [
            helper.make_node("Transpose", [kind], [f"{kind}_GHLK"], perm=[1, 2, 0, 3]),
            helper.make_node("Concat", joined, [f"new_{kind}_0"], axis=2),
        ]
    return nodes


@cache
def step_backend(folder: Path, dtype: str, kv_layout: str) -> OnnxRuntimeBackend:
    io = step_io(dtype, kv_layout)
    path = write_model(folder / f"{dtype}-{kv_layout}.onnx", io, step_nodes(kv_layout))
    return OnnxRuntimeBackend({"step": path}, {"step": io}, kv_layout=kv_layout, num_threads=1)


ADD_IO = StageIO(inputs={"a": Axes("N"), "b": Axes("N")}, outputs={"sum": Axes("N")})


@pytest.fixture
def adder(tmp_path: Path) -> OnnxRuntimeBackend:
    path = write_model(
        tmp_path / "add.onnx", ADD_IO, [helper.make_node("Add", ["a", "b"], ["sum"])]
    )
    return OnnxRuntimeBackend({"add": path}, {"add": ADD_IO}, kv_layout="delta", num_threads=1)


def test_a_result_is_written_into_the_array_given_for_it(adder: OnnxRuntimeBackend) -> None:
    arena = np.full(10, -1, np.float32)
    a = np.arange(4, dtype=np.float32)
    results = adder.run("add", {"a": a, "b": a}, {"sum": arena[3:7]})
    assert np.shares_memory(results["sum"], arena)
    np.testing.assert_array_equal(arena, [-1, -1, -1, 0, 2, 4, 6, -1, -1, -1])


def test_results_without_a_place_belong_to_the_caller(adder: OnnxRuntimeBackend) -> None:
    ones = np.ones(3, np.float32)
    first = adder.run("add", {"a": ones, "b": ones})["sum"]
    second = adder.run("add", {"a": 2 * ones, "b": ones})["sum"]
    np.testing.assert_array_equal(first, [2, 2, 2])
    np.testing.assert_array_equal(second, [3, 3, 3])


def test_inputs_need_not_be_contiguous(adder: OnnxRuntimeBackend) -> None:
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    result = adder.run("add", {"a": table[:, 1], "b": table[::-1, 3]})["sum"]
    np.testing.assert_array_equal(result, table[:, 1] + table[::-1, 3])


def test_a_place_that_does_not_fit_is_named(adder: OnnxRuntimeBackend) -> None:
    feeds = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}
    for place in (np.ones(4, "float32"), np.ones(3, "float16"), np.ones(6, "float32")[::2]):
        with pytest.raises(FeedError, match=r"array for sum is .* expected float32"):
            adder.run("add", feeds, {"sum": place})
    with pytest.raises(FeedError, match="unknown output 'total'; known: sum"):
        adder.run("add", feeds, {"total": np.ones(3, np.float32)})


def test_feeds_are_checked_even_after_good_ones(adder: OnnxRuntimeBackend) -> None:
    ones = np.ones(3, np.float32)
    adder.run("add", {"a": ones, "b": ones})
    with pytest.raises(FeedError, match=r"add: b has shape \(4,\)"):
        adder.run("add", {"a": ones, "b": np.ones(4, np.float32)})
    with pytest.raises(FeedError, match="add: b is float64"):
        adder.run("add", {"a": ones, "b": np.ones(3)})
    with pytest.raises(FeedError, match="missing input 'b'"):
        adder.run("add", {"a": ones})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("kv_layout", ["delta", "present"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@settings(deadline=None)
@given(schedule=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_the_cache_grows_in_the_arena_from_an_empty_past(
    folder: Path, schedule: list[int], dtype: str, kv_layout: str
) -> None:
    backend = step_backend(folder, dtype, kv_layout)
    arena = backend.new_arena(KVShape(1, sum(schedule), 3, 2, 8, backend.kv_dtype()))
    seen = np.zeros((0, 3, 2, 8), dtype)
    for length in schedule:
        x = np.random.default_rng(length).integers(-9, 9, (length, 3, 2, 8)).astype(dtype)
        results = backend.run("step", {"x": x, **arena.past()}, arena.new(length))
        arena.advance(length)
        np.testing.assert_array_equal(results["total"], 2 * seen.sum(0))
        seen = np.concatenate([seen, x])
        swap = (2, 0, 1, 3) if kv_layout == "present" else (0, 1, 2, 3)
        cached = {name: array.transpose(swap) for name, array in arena.past().items()}
        np.testing.assert_array_equal(cached["past_k_0"], 2 * seen)
        np.testing.assert_array_equal(cached["past_v_0"], -seen)


def test_booleans_and_scalars_pass(tmp_path: Path) -> None:
    io = StageIO(
        inputs={"keep": Axes("N", "bool"), "value": Axes("")},
        outputs={"dropped": Axes("N", "bool"), "twice": Axes("")},
    )
    nodes = [
        helper.make_node("Not", ["keep"], ["dropped"]),
        helper.make_node("Add", ["value", "value"], ["twice"]),
    ]
    path = write_model(tmp_path / "model.onnx", io, nodes)
    backend = OnnxRuntimeBackend({"s": path}, {"s": io}, kv_layout="delta", num_threads=1)
    results = backend.run("s", {"keep": np.array([True, False]), "value": backend.scalar(1.5)})
    np.testing.assert_array_equal(results["dropped"], [False, True])
    assert results["twice"].shape == ()
    assert results["twice"] == 3


def test_upload_shares_memory_and_download_copies(adder: OnnxRuntimeBackend) -> None:
    array = np.arange(6.0).reshape(2, 3)
    assert adder.upload(array) is array
    assert adder.upload(array.T).flags.c_contiguous
    assert adder.upload(np.array(1.0)).shape == ()
    assert not np.shares_memory(adder.download(array), array)


def test_a_failed_run_is_one_line_and_nothing_on_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_hollow_model(tmp_path / "model.onnx", ADD_IO)  # its result has another shape
    backend = OnnxRuntimeBackend({"add": path}, {"add": ADD_IO}, kv_layout="delta", num_threads=1)
    ones = np.ones(3, np.float32)
    with pytest.raises(BackendError, match="onnxruntime: stage add failed: ") as caught:
        backend.run("add", {"a": ones, "b": ones})
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert capfd.readouterr().err == ""


def test_out_of_memory_says_what_to_do(adder: OnnxRuntimeBackend) -> None:
    with pytest.raises(BackendError, match=r"out of memory.*--batch-size"):
        adder.allocate((1 << 60,), "float32")


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_model_that_does_not_load_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    backend = OnnxRuntimeBackend({"add": path}, {"add": ADD_IO}, kv_layout="delta", num_threads=1)
    with pytest.raises(
        EngineError, match=r"model\.onnx cannot be loaded.*export its folder"
    ) as caught:
        backend.wait()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        StageIO(inputs={"a": Axes("N"), "c": Axes("N")}, outputs={"sum": Axes("N")}),
        StageIO(inputs={"a": Axes("N"), "b": Axes("N", "int64")}, outputs={"sum": Axes("N")}),
        StageIO(inputs=ADD_IO.inputs, outputs={"sum": Axes("N", "float16")}),
        StageIO(inputs=ADD_IO.inputs, outputs={"sum": Axes("N"), "more": Axes("N")}),
    ],
)
def test_a_model_with_other_tensors_is_refused(tmp_path: Path, other: StageIO) -> None:
    path = write_hollow_model(tmp_path / "model.onnx", other)
    backend = OnnxRuntimeBackend({"add": path}, {"add": ADD_IO}, kv_layout="delta", num_threads=1)
    with pytest.raises(EngineError, match="not as the manifest declares"):
        backend.wait()


def test_a_model_may_lack_an_input_it_does_not_use(tmp_path: Path) -> None:
    only_a = StageIO(inputs={"a": Axes("N")}, outputs={"sum": Axes("N")})
    nodes = [helper.make_node("Neg", ["a"], ["sum"])]
    path = write_model(tmp_path / "model.onnx", only_a, nodes)
    backend = OnnxRuntimeBackend({"add": path}, {"add": ADD_IO}, kv_layout="delta", num_threads=1)
    ones = np.ones(2, np.float32)
    np.testing.assert_array_equal(backend.run("add", {"a": ones, "b": ones})["sum"], -ones)


def test_bfloat16_is_refused_with_the_way_out() -> None:
    io = StageIO(inputs={"x": Axes("N", "bfloat16")}, outputs={"y": Axes("N")})
    with pytest.raises(EngineError, match=r"x is bfloat16.*--fp16"):
        OnnxRuntimeBackend({}, {"s": io}, kv_layout="delta")


def test_an_unknown_provider_is_refused_with_those_there_are() -> None:
    with pytest.raises(BackendError, match=r"no provider Rocket.*CPUExecution"):
        OnnxRuntimeBackend({}, {}, kv_layout="delta", providers=["RocketExecutionProvider"])


def test_without_a_gpu_the_cpu_is_chosen_even_where_cuda_is_compiled_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nsp.backends.onnxruntime.ort_backend.find_gpu", lambda: None)
    module = types.ModuleType("onnxruntime")
    module.get_available_providers = lambda: [CUDA, CPU]  # type: ignore[attr-defined]
    assert choose_providers(module) == (CPU,)
    assert choose_providers(module, [CUDA]) == (CUDA, CPU)


def test_without_onnxruntime_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        OnnxRuntimeBackend({}, {}, kv_layout="delta")


def test_one_backend_serves_several_threads(adder: OnnxRuntimeBackend) -> None:
    def is_right(value: int) -> bool:
        array = np.full(50, value, np.float32)
        results = (adder.run("add", {"a": array, "b": array})["sum"] for _ in range(50))
        return all((result == 2 * value).all() for result in results)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, range(4)))


@pytest.mark.parametrize("num_threads", [0, -3, 1.5, True, "all"])
def test_a_number_of_threads_is_at_least_one(num_threads: object) -> None:
    with pytest.raises(ConfigError, match="num_threads must be an integer of at least 1"):
        OnnxRuntimeBackend({}, {}, kv_layout="delta", num_threads=num_threads)


def test_a_loop_that_has_ended_gives_its_cache_to_the_next_one(folder: Path) -> None:
    backend, shape = step_backend(folder, "float32", "present"), KVShape(1, 4, 3, 2, 8, "float32")
    with backend.arena(shape) as first:
        first.keep_rows(1)
        first.advance(2)
        with backend.arena(shape) as second:  # a stream that is not read to its end
            assert second is not first
    with backend.arena(shape) as third:
        assert third is first
        assert third.past()["past_k_0"].shape == (3, 2, 0, 8)
