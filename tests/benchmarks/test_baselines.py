"""What the baselines promise: the numbers of the plain modules, however they are run."""

from typing import Any

import numpy as np
import pytest
import torch

from nsp.backends.torch import TorchBackend
from nsp.benchmarks.peers.torch_recorded import (
    CompiledTorchBackend,
    RecordedTorchBackend,
    eager,
    graphed,
)
from nsp.families.var.config import size, with_condition
from nsp.family.classes import ClassCondition
from nsp.family.registry import family
from nsp.layers.attention import attend_delta
from nsp.pipeline.pipeline import Pipeline
from nsp.stage.arena import DeltaArena, KVShape
from nsp.text.parts import TextEncoderSettings

VAR = family("var")


@pytest.fixture(scope="module")
def system() -> Any:
    torch.manual_seed(0)
    config = with_condition(size("tiny"), ClassCondition(num_classes=10))
    made = VAR.learner.new_system(config, TextEncoderSettings(), None)
    with torch.no_grad():
        made.predictor.head.weight.mul_(100)
        for block in made.predictor.blocks:
            block.ada_lin[1].weight.mul_(10)
    return made


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def pair(system: Any, request: pytest.FixtureRequest) -> tuple[Pipeline, Pipeline]:
    settings = {"precision": request.param, "device": "cpu"}
    return eager(VAR, system, **settings), graphed(VAR, system, **settings)


def test_the_cache_in_place_and_the_recording_change_nothing(
    pair: tuple[Pipeline, Pipeline],
) -> None:
    plain, recorded = pair
    for seed, classes in ((1, [1, 2]), (2, [3, 4]), (1, [1, 2]), (1, [5])):
        settings: dict[str, Any] = {"class_ids": classes, "seed": seed, "trace": True}
        expected, ours = plain.generate(**settings).trace, recorded.generate(**settings).trace
        assert expected is not None
        assert ours is not None
        for a, b in zip(expected.tokens, ours.tokens, strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(expected.logits, ours.logits, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(
            recorded.generate(class_ids=classes, seed=seed).images,
            plain.generate(class_ids=classes, seed=seed).images,
        )
    assert isinstance(recorded.backend, RecordedTorchBackend)
    assert len(recorded.backend._recordings) == 4  # scales and pictures, of two batch sizes


def test_inputs_and_cache_stay_where_a_recording_holds_them(
    pair: tuple[Pipeline, Pipeline],
) -> None:
    backend = pair[1].backend
    seen = []

    def loop(played: Any, inputs: Any) -> Any:
        arena = played.new_arena(KVShape(1, 5, 2, 2, 8, "float32"))
        views = {**inputs, **arena.past(), **arena.new(2)}
        arena.advance(2)
        seen.append({name: view.data_ptr() for name, view in views.items()})
        yield inputs["a"].clone(), inputs["b"].clone()

    for value in (1, 2):
        inputs = {"a": np.full((3, 5), value, np.int64), "b": np.array(value / 4, np.float32)}
        ((a, b),) = backend.play("loop", inputs, loop)
        assert (a == value).all()
        assert b == value / 4
    assert seen[0] == seen[1]
    assert (seen[0]["b"] - seen[0]["a"]) % 256 == 0


def test_attention_in_place_is_that_of_joined_copies() -> None:
    torch.manual_seed(0)
    arena = DeltaArena(KVShape(1, 9, 2, 3, 4, "float32"), TorchBackend({}, {}))
    from nsp.benchmarks.peers.torch_recorded import attend_in_place

    for length in (1, 3, 5):
        q, k, v = (torch.randn(2, length, 3, 4) for _ in range(3))
        past = tuple(arena.past().values())
        expected, (new_k, _) = attend_delta(q, k, v, past, scale=0.5)
        ours, (placed_k, placed_v) = attend_in_place(q, k, v, past, scale=0.5)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(placed_k, new_k)
        room = arena.new(length)
        assert placed_k.data_ptr() == room["new_k_0"].data_ptr()
        assert placed_v.data_ptr() == room["new_v_0"].data_ptr()
        arena.advance(length)


def test_compiled_stages_compute_the_same(system: Any) -> None:
    io = VAR.stages_io(system.config, kv_layout="delta", dtype="float32")["select"]
    stages = {"select": VAR.learner.modules(system, "delta")["select"]}
    backend = CompiledTorchBackend(
        stages, {"select": io}, device="cpu", compile_options={"backend": "aot_eager"}
    )
    rng = np.random.default_rng(0)
    feeds = {
        "logits": rng.standard_normal((4, 9, 64)).astype(np.float32),
        "uniforms": rng.random((2, 9), np.float32),
        "forced": np.full((2, 9), -1),
        "guidance": np.full(2, 2, np.float32),
        "temperature": np.ones(2, np.float32),
        "top_p": np.ones(2, np.float32),
        "top_k": np.zeros(2, np.int64),
        "ranks": np.arange(1),
    }
    uploaded = {name: backend.upload(array) for name, array in feeds.items()}
    with torch.inference_mode():
        expected = stages["select"](*uploaded.values())
    found = backend.run("select", uploaded)
    for tensor, result in zip(expected, found.values(), strict=True):
        torch.testing.assert_close(result, tensor)


@pytest.mark.gpu
def test_a_graph_is_replayed_with_new_inputs_on_a_gpu(system: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need an NVIDIA GPU and a torch that uses it")
    plain, recorded = (
        make(VAR, system, precision="fp16", device="cuda") for make in (eager, graphed)
    )
    for seed in (1, 2, 1):
        ours, expected = (p.generate(class_ids=[1, 2], seed=seed) for p in (recorded, plain))
        np.testing.assert_array_equal(ours.images, expected.images)
