"""What the TensorRT backends promise, on a stand-in for GPU and TensorRT that really computes."""

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.backends.nvidia import Gpu
from nsp.backends.tensorrt import cuda as cuda_module
from nsp.backends.tensorrt import trt_engine as tensorrt_engine
from nsp.backends.tensorrt.cuda import DeviceArray, Stream
from nsp.distribution import pip_install
from nsp.errors import BackendError, EngineError, FeedError, ProfileError
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.results import Trace
from nsp.stage.arena import KVShape
from tests.backends.machine import Machine
from tests.backends.nvidia import CudaStandIn, cudaError_t

CLASSES = {"class_ids": [3, 7]}


@pytest.fixture(scope="module")
def class_system(tiny_class_checkpoint: Path) -> Any:
    return read_checkpoint(tiny_class_checkpoint).load()


@pytest.fixture
def machine(class_system: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(class_system, tmp_path, monkeypatch)


@pytest.fixture
def text_machine(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(read_checkpoint(tiny_checkpoint).load(), tmp_path, monkeypatch)


def traced(pipe: Pipeline, **request: Any) -> Trace:
    trace = pipe.generate(trace=True, **request).trace
    assert trace is not None
    return trace


def assert_same(found: Trace, expected: Trace) -> None:
    for scale, tokens in enumerate(expected.tokens):
        np.testing.assert_array_equal(found.tokens[scale], tokens, err_msg=f"scale {scale}")
        np.testing.assert_array_equal(found.logits[scale], expected.logits[scale])
        np.testing.assert_array_equal(found.latents[scale], expected.latents[scale])
    np.testing.assert_array_equal(found.image, expected.image)


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"guidance_scale": 1.0, "top_k": 1},
    {"top_p": 0.9, "more_smooth": True},
    {"guidance_until": 2},  # rows are left out after it
)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_first_captured_and_replayed_calls_give_the_tokens_of_pytorch(
    machine: Machine, flavour: str
) -> None:
    pipe, reference = machine.load(flavour), machine.reference()
    for settings in SETTINGS if flavour == "tensorrt" else SETTINGS[:1]:
        for seed in range(3):  # run, captured, replayed: with other numbers every time
            request = {"class_ids": [seed, 7 - seed], "seed": seed, **settings}
            assert_same(traced(pipe, **request), traced(reference, **request))


def test_prompts_are_inputs_of_the_graph(text_machine: Machine) -> None:
    pipe, reference = text_machine.load(), text_machine.reference()
    for prompts in (["red apple"], ["smiling cat"], ["green apple"], ["snow-capped mountain"]):
        found, expected = (p.generate(prompts=prompts).images for p in (pipe, reference))
        np.testing.assert_array_equal(found, expected)
    text_machine.clear()
    pipe.generate(prompts=["green apple"])
    assert text_machine.cuda.calls.count("cudaGraphLaunch") == 1
    # Two rows of one prompt and two prompts have the same shapes and share a recording.
    for prompts in (["red apple", "red apple"], ["red apple", "smiling cat"]):
        text_machine.clear()
        found, expected = (p.generate(prompts=prompts).images for p in (pipe, reference))
        np.testing.assert_array_equal(found, expected)
    assert not text_machine.noted("create")


def test_a_picture_is_one_upload_and_one_graph_and_allocates_nothing(machine: Machine) -> None:
    pipe, reference = machine.load(), machine.reference()
    for seed in range(2):
        pipe.generate(**CLASSES, seed=seed)
    machine.clear()
    settings = {"guidance_scale": 5.0, "temperature": 0.7}
    image = pipe.generate(**CLASSES, seed=2, **settings).images
    np.testing.assert_array_equal(image, reference.generate(**CLASSES, seed=2, **settings).images)
    calls = machine.cuda.calls
    assert calls.count("cudaGraphLaunch") == 1
    assert calls.count("cudaMemcpyAsync") == 3  # inputs in; the picture copied out, and down
    assert {"cudaMalloc", "cudaHostAlloc", "cudaStreamBeginCapture"}.isdisjoint(calls)
    assert {call[0] for call in machine.trt["tensorrt"]._calls} == {"compute"}


def test_a_stream_is_one_graph_per_scale(machine: Machine) -> None:
    pipe = machine.load()
    for seed in range(2):
        list(pipe.stream(**CLASSES, seed=seed))
    machine.clear()
    for number, _ in enumerate(pipe.stream(**CLASSES, seed=2), 1):
        assert machine.cuda.calls.count("cudaGraphLaunch") == number
    assert number == pipe.config.num_scales
    assert not machine.noted("enqueue")


def test_every_scale_has_its_profile_and_every_profile_its_context(machine: Machine) -> None:
    pipe = machine.load()
    pipe.generate(**CLASSES)
    scales = range(pipe.config.num_scales)
    steps = [call[2] for call in machine.noted("enqueue") if call[1] == "step"]
    assert steps == list(scales)
    profiles = [call[2] for call in machine.noted("profile") if call[1] == "step"]
    assert profiles == list(scales)
    pipe.generate(**CLASSES)  # captured: nothing is bound again
    assert len([call for call in machine.noted("shape") if call[1:3] == ("decoder", "latent")]) == 1


def test_keys_and_values_lie_where_the_next_step_reads_them(machine: Machine) -> None:
    pipe = machine.load()
    pipe.generate(**CLASSES)
    bound = [c[2:] for c in machine.noted("address") if c[1] == "step" and "k_0" in c[2]]
    past = [address for name, address in bound if name == "past_k_0"]
    new = [address for name, address in bound if name == "new_k_0"]
    assert len(past) == len(new) == pipe.config.num_scales
    assert set(past) == {past[0]}  # the base, also where the past is empty
    predictor = pipe.config.predictor
    token_bytes = 4 * len(CLASSES["class_ids"]) * 2 * predictor.num_heads * predictor.head_width
    starts = np.cumsum([0, *(n * n for n in pipe.config.patch_nums)])[:-1]
    assert token_bytes % 256 == 0
    assert new == [past[0] + int(start) * token_bytes for start in starts]


def test_tensors_that_are_not_aligned_are_copied(machine: Machine) -> None:
    backend = machine.load().backend
    vocab_size = machine.config.vae.vocab_size
    rng = np.random.default_rng(0)
    feeds = {
        "logits": rng.standard_normal((1, 1, vocab_size)).astype(np.float32),
        "uniforms": np.array([[0.7]], np.float32),
        "forced": np.array([[-1]]),
        "guidance": np.ones(1, np.float32),
        "temperature": np.ones(1, np.float32),
        "top_p": np.ones(1, np.float32),
        "top_k": np.zeros(1, np.int64),
        "ranks": np.arange(1),
    }
    expected = machine.modules["select"](*(torch.from_numpy(feed) for feed in feeds.values()))
    arrays = {name: backend.upload(feed) for name, feed in feeds.items()}
    arrays["uniforms"] = backend.upload(np.array([[0.1], [0.7]], np.float32))[1:]
    tokens = backend.upload(np.zeros((3, 1), np.int64))
    assert arrays["uniforms"].address % 256
    backend.run("select", arrays, {"tokens": tokens[1:2]})
    assert backend.download(tokens).ravel().tolist() == [0, int(expected[0]), 0]


def test_all_contexts_share_one_scratch_block(machine: Machine) -> None:
    machine.write_plans(max_batch=2, scratch=5000)
    first, second = machine.load(), machine.load()
    for pipe in (first, second):
        machine.clear()
        pipe.generate(**CLASSES)
        assert len({call[2] for call in machine.noted("memory")}) == 1
    scratches = {pipe.backend._scratch.address for pipe in (first, second)}
    assert len(scratches) == 2
    assert first.backend.stream.handle != second.backend.stream.handle


def test_two_pipelines_and_two_streams_do_not_disturb_each_other(machine: Machine) -> None:
    one, other = machine.load(), machine.load()
    reference = machine.reference()
    expected = [traced(reference, **CLASSES, seed=seed) for seed in (1, 2, 3)]
    for _ in range(3):
        streams = [
            pipe.stream(**CLASSES, seed=seed) for pipe, seed in ((one, 1), (one, 2), (other, 3))
        ]
        for scale, steps in enumerate(zip(*streams, strict=True)):
            for step, trace in zip(steps, expected, strict=True):
                np.testing.assert_array_equal(step.tokens, trace.tokens[scale])
                np.testing.assert_array_equal(step.latent, trace.latents[scale])


def test_results_stay_what_they_were(machine: Machine) -> None:
    pipe = machine.load()
    kept = []
    for seed in range(3):
        steps = list(pipe.stream(**CLASSES, seed=seed))
        kept.append((steps, [step.latent for step in steps], steps[-1].decode()))
    for steps, latents, picture in kept:
        for step, latent in zip(steps, latents, strict=True):
            np.testing.assert_array_equal(step.latent, latent)
        np.testing.assert_array_equal(steps[-1].decode(), picture)


def test_a_stream_that_is_left_leaves_its_recording_usable(machine: Machine) -> None:
    pipe, reference = machine.load(), machine.reference()
    for left_after in (1, 2, 1, 3):
        steps = pipe.stream(**CLASSES, seed=left_after)
        for _ in range(left_after):
            next(steps)
        steps.close()
        assert_same(traced(pipe, **CLASSES, seed=5), traced(reference, **CLASSES, seed=5))
    assert len(pipe.backend._recorder._recordings) == 1


def test_other_sizes_share_the_largest_workspace(machine: Machine) -> None:
    pipe = machine.load()
    for _ in range(3):
        for batch in (1, 2, 3):
            pipe.generate(class_ids=[1] * batch)
    recordings = pipe.backend._recorder._recordings
    assert len({each.workspace.memory.address for each in recordings}) == 1
    machine.clear()
    for batch in (1, 2, 3):
        pipe.generate(class_ids=[1] * batch)
    assert machine.cuda.calls.count("cudaGraphLaunch") == 3


def test_memory_goes_back_with_the_pipeline(machine: Machine) -> None:
    pipe = machine.load()
    pipe.generate(**CLASSES)
    del pipe
    assert machine.cuda._held == 0
    assert not machine.cuda._streams
    assert not machine.cuda._host


def test_memory_goes_back_with_a_pipeline_that_is_part_of_a_cycle(machine: Machine) -> None:
    pipe: Any = machine.load()
    pipe.generate(**CLASSES)
    pipe.service = {"pipeline": pipe}
    del pipe
    gc.collect()
    assert machine.cuda._held == 0
    assert not machine.cuda._streams
    assert not machine.cuda._host


def test_an_engine_that_cannot_be_captured_runs_stage_by_stage(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.trt["tensorrt_rtx"]._capturable = False
    pipe, reference = machine.load("tensorrt_rtx"), machine.reference()
    for seed in range(3):
        assert_same(traced(pipe, **CLASSES, seed=seed), traced(reference, **CLASSES, seed=seed))
    assert "cudaGraphLaunch" not in machine.cuda.calls
    assert caplog.text.count("not as a CUDA graph") == 1


def test_a_capture_that_fails_is_said_once_and_the_picture_is_made(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, reference = machine.load(), machine.reference()
    failure = cudaError_t.cudaErrorStreamCaptureUnsupported
    machine.cuda._failures["cudaStreamEndCapture"] = failure
    for seed in range(3):
        assert_same(traced(pipe, **CLASSES, seed=seed), traced(reference, **CLASSES, seed=seed))
    assert caplog.text.count("cudaErrorStreamCaptureUnsupported") == 1


def test_kernels_compiled_here_are_kept_for_the_user_and_not_in_the_engine_folder(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = sorted(machine.folder.rglob("*"))
    machine.load("tensorrt_rtx").generate(**CLASSES)
    assert sorted(machine.folder.rglob("*")) == before
    (cache,) = machine.user_cache.glob("nsp/tensorrt_rtx/*.cache")
    assert cache.read_bytes() == b"kernels"
    machine.load("tensorrt_rtx").generate(**CLASSES)
    assert f"compiled kernels from {cache}" in caplog.text
    cache.write_bytes(b"rubbish")
    machine.load("tensorrt_rtx").generate(**CLASSES)
    assert f"{cache} is damaged" in caplog.text
    assert cache.read_bytes() == b"kernels"


def test_a_kernel_cache_that_cannot_be_read_is_said_and_left(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.load("tensorrt_rtx").generate(**CLASSES)
    real = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.is_relative_to(machine.user_cache):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", denied)
        machine.load("tensorrt_rtx").generate(**CLASSES)
    assert "Permission denied" in caplog.text
    assert "compiling kernels again" in caplog.text


def test_garbage_is_not_collected_while_a_graph_is_captured() -> None:
    stream = Stream(CudaStandIn(), "test")
    with stream.capture():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), stream.capture():
        raise KeyError
    assert gc.isenabled()


def refusal(kind: type[Exception], action: Any) -> str:
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_sizes_without_a_profile_name_them_and_the_export(machine: Machine) -> None:
    pipe = machine.load("tensorrt_rtx")
    message = refusal(ProfileError, lambda: pipe.generate(class_ids=[1] * 4))
    assert "condition: class_ids (8,)" in message
    assert "allows (1,) to (6,)" in message
    assert message.endswith("nsp export --target tensorrt-rtx --max-batch N")


def test_engines_of_full_batches_say_that_every_step_is_guided(machine: Machine) -> None:
    machine.write_plans(max_batch=2, static_batch=True)
    pipe = machine.load()
    pipe.generate(class_ids=[1, 2])
    machine.clear()
    for settings in ({"guidance_scale": 1.0}, {"guidance_until": 1}):
        message = refusal(
            ProfileError, lambda settings=settings: pipe.generate(**CLASSES, **settings)
        )
        assert "need guidance at every step" in message
        assert "smaller --batch-size" not in message
    assert not machine.noted("compute")  # nothing runs before it is refused


@pytest.mark.parametrize("content", [b"", b"PK rubbish"])
def test_a_damaged_plan_is_one_line(machine: Machine, content: bytes) -> None:
    machine.files["step"].write_bytes(content)
    assert str(machine.files["step"]) in refusal(EngineError, machine.load)
    assert machine.cuda._held == 0


def test_an_engine_of_another_stage_is_refused(machine: Machine) -> None:
    machine.files["step"] = machine.files["select"]
    message = refusal(EngineError, machine.load)
    assert "of stage step is not as the manifest declares it" in message


def test_engines_larger_than_the_free_memory_say_how_much_is_missing(machine: Machine) -> None:
    machine.files["step"].write_bytes(bytes(3 << 20))
    machine.cuda._total = 1 << 20
    message = refusal(BackendError, machine.load)
    assert "1 MiB of 1 MiB GPU memory are free (2 MiB too few)" in message
    assert "--fp16" in message


def test_a_batch_larger_than_the_free_memory_says_what_to_change(machine: Machine) -> None:
    pipe = machine.load()
    machine.cuda._total = machine.cuda._held + 4096
    message = refusal(BackendError, lambda: pipe.generate(**CLASSES))
    assert "out of GPU memory" in message
    assert "too few); use a smaller --batch-size" in message
    machine.cuda._total = 1 << 30
    pipe.generate(**CLASSES)  # nothing is left broken


def test_a_stage_that_fails_says_what_tensorrt_said(machine: Machine) -> None:
    pipe = machine.load()
    machine.trt["tensorrt"]._failing = "accumulate"
    message = refusal(BackendError, lambda: pipe.generate(**CLASSES))
    expected = "tensorrt: stage accumulate failed (Cuda failure: an illegal memory access)"
    assert message == expected


def test_a_stage_without_memory_says_what_to_change(machine: Machine) -> None:
    pipe = machine.load()
    machine.trt["tensorrt"]._failing = "accumulate"
    machine.trt["tensorrt"]._failure = "Error Code 2: OutOfMemory (no further information)"
    message = refusal(BackendError, lambda: pipe.generate(**CLASSES))
    assert "out of GPU memory in stage accumulate" in message
    assert "smaller --batch-size" in message


def test_a_gpu_that_fails_is_one_line(machine: Machine) -> None:
    pipe = machine.load()
    machine.cuda._failures["cudaStreamSynchronize"] = cudaError_t.cudaErrorIllegalAddress
    message = refusal(BackendError, lambda: pipe.generate(**CLASSES))
    assert "IllegalAddress (cudaErrorIllegalAddress, in cudaStreamSynchronize)" in message


def test_arrays_given_for_outputs_are_checked(machine: Machine) -> None:
    backend = machine.load().backend
    ids = backend.upload(np.array([1, 2]))
    wrong = backend.allocate((3, 1), "float32")
    for given, message in (
        ({"x": wrong}, r"the array for x is float32 \(3, 1\)"),
        ({"y": wrong}, "unknown output 'y'"),
    ):
        with pytest.raises(FeedError, match=message):
            backend.run("condition", {"class_ids": ids}, given)


def test_views_are_arithmetic_on_addresses() -> None:
    array = DeviceArray(1024, (6, 2, 8), "float16", None)
    part = array[2:5]
    assert (part.address, part.shape, part.num_bytes) == (1024 + 64, (3, 2, 8), 96)
    assert (array[:0].address, array[:0].shape) == (1024, (0, 2, 8))
    assert array[4:].reshape((32,)).address == 1024 + 128


def test_uploads_come_back_and_freed_memory_is_used_again() -> None:
    cuda = CudaStandIn()
    stream = Stream(cuda, "test")
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for _ in range(3):
        np.testing.assert_array_equal(stream.download(stream.upload(values)), values)
    assert cuda.calls.count("cudaMalloc") == 1
    bits = stream.upload(np.array([0xC0003F80]))  # 1 and -2
    brain = DeviceArray(bits.address, (2,), "bfloat16", bits.memory)
    np.testing.assert_array_equal(stream.download(brain), np.array([1, -2], np.float32))


def test_the_arena_of_bfloat16_steps_has_their_dtype(machine: Machine) -> None:
    arena = machine.load().backend.new_arena(KVShape(1, 4, 2, 2, 8, "bfloat16"))
    assert arena.past()["past_k_0"].dtype == "bfloat16"
    assert arena.new(2)["new_v_0"].num_bytes == 2 * 2 * 2 * 8 * 2


@pytest.fixture
def no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(cuda_module.importlib, "import_module", fail)


@pytest.mark.usefixtures("no_bindings")
def test_absent_packages_name_their_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_engine, "find_gpu", lambda: Gpu("NVIDIA L4", "8.9", "13.0"))
    assert "pip install 'cuda-bindings" in refusal(BackendError, cuda_module.import_cuda)
    message = refusal(BackendError, lambda: tensorrt_engine.import_tensorrt("tensorrt_rtx"))
    assert message.endswith(pip_install("tensorrt-rtx"))
    monkeypatch.setattr(tensorrt_engine, "find_gpu", lambda: None)
    message = refusal(BackendError, lambda: tensorrt_engine.import_tensorrt("tensorrt_rtx"))
    assert message.endswith("it needs an NVIDIA GPU, which this machine does not have")
