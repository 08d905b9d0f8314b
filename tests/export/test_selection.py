"""What the selection stages promise: every image's own settings, in PyTorch, graphs and engines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nsp.backends.onnxruntime.ort_backend import OnnxRuntimeBackend
from nsp.backends.torch import TorchBackend
from nsp.errors import ConfigError
from nsp.export.compile.engine import build_engine
from nsp.export.graph.lint import check_graph
from nsp.export.graph.onnx_export import export_stage
from nsp.families.var.config import with_condition
from nsp.families.var.sampling import VarSampling
from nsp.family.classes import ClassCondition
from nsp.family.contract import trace_sizes
from nsp.family.registry import family
from nsp.pipeline.pipeline import Pipeline, torch_pipeline
from nsp.stage.backend import TENSORRT_RANKS, Backend
from nsp.stage.io import StageIO
from nsp.text.parts import TextEncoderSettings
from tests.export.small import rtx, small_config
from tests.export.test_lint import planned

VAR = family("var")
CODES = 4096  # more than TensorRT can sort
STAGES = ("select", "select_smooth", "select_nucleus", "select_smooth_nucleus")
# guidance, temperature, top_p, top_k
ROWS = ((1.0, 1.0, 1.0, 0), (3.0, 0.7, 0.9, 0), (2.0, 1.0, 1.0, 7), (1.0, 1.5, 0.6, 900))


@pytest.fixture(scope="module")
def wide_system() -> Any:
    """A model of more codes than TensorRT can sort."""
    config = with_condition(small_config(), ClassCondition(num_classes=5))
    config = replace(config, vae=replace(config.vae, vocab_size=CODES))
    return VAR.learner.new_system(config, TextEncoderSettings(), None).eval()


def declared(system: Any) -> dict[str, StageIO]:
    return VAR.stages_io(system.config, kv_layout="delta", dtype="float32")


def torch_backend(system: Any) -> Backend:
    stages = VAR.learner.modules(system, "delta")
    return TorchBackend(stages, declared(system), kv_layout="delta", device="cpu")


def graph_of(system: Any, stage: str, folder: Path, opset: int) -> Path:
    return export_stage(
        VAR.learner.modules(system, "delta")[stage],
        declared(system)[stage],
        folder,
        name=stage,
        opset=opset,
        trace_sizes=trace_sizes(VAR.stages(system.config, kv_layout="delta", dtype="float32")),
        metadata={},
    )


def feeds(stage: str, length: int = 9) -> dict[str, NDArray[Any]]:
    """Return inputs of a guided batch in which every image has other settings."""
    rng, batch = np.random.default_rng(0), len(ROWS)
    guidance, temperature, top_p = (np.array([r[i] for r in ROWS], np.float32) for i in range(3))
    arrays: dict[str, NDArray[Any]] = {
        "logits": 2 * rng.standard_normal((2 * batch, length, CODES)).astype(np.float32),
        "uniforms": rng.random((batch, length), np.float32),
        "forced": np.full((batch, length), -1),
        "guidance": guidance,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": np.array([row[3] for row in ROWS]),
        "ranks": np.arange(1024 if stage.endswith("nucleus") else CODES),
    }
    if "smooth" in stage:
        arrays["gumbel"] = rng.gumbel(size=(batch, length, CODES)).astype(np.float32)
        arrays["ratio"] = np.array(0.5, np.float32)
    return arrays


def run(backend: Backend, stage: str, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    results = backend.run(stage, {name: backend.upload(each) for name, each in arrays.items()})
    return {name: backend.download(each) for name, each in results.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_is_drawn_as_it_is_alone(wide_system: Any, stage: str) -> None:
    backend, arrays = torch_backend(wide_system), feeds(stage)
    mixed = run(backend, stage, arrays)
    for i, (guidance, _, top_p, top_k) in enumerate(ROWS):
        alone = {name: each[i : i + 1] for name, each in arrays.items() if each.ndim}
        rows = [i] if guidance == 1 else [i, len(ROWS) + i]
        alone["logits"] = arrays["logits"][rows]
        settings = VarSampling(top_p=top_p, top_k=top_k)
        ranks = max(top_k, 1) if stage.endswith("nucleus") else settings.num_ranks(CODES)
        alone["ranks"] = np.arange(ranks)
        if "smooth" in stage:
            alone["ratio"] = arrays["ratio"]
        found = run(backend, stage, alone)
        np.testing.assert_array_equal(found["tokens"], mixed["tokens"][i : i + 1])
        np.testing.assert_array_equal(found["guided"], mixed["guided"][i : i + 1])
        np.testing.assert_allclose(found["codes"], mixed["codes"][i : i + 1], atol=1e-6)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_draws_the_tokens_of_pytorch(
    wide_system: Any, tmp_path: Path, stage: str, opset: int
) -> None:
    io, arrays = declared(wide_system)[stage], feeds(stage)
    path = graph_of(wide_system, stage, tmp_path, opset)
    check_graph(path, replace(planned(io), opset=opset))
    graphs = OnnxRuntimeBackend({stage: path}, {stage: io}, kv_layout="delta")
    expected = run(torch_backend(wide_system), stage, arrays)
    found = run(graphs, stage, arrays)
    np.testing.assert_array_equal(found["tokens"], expected["tokens"])
    np.testing.assert_allclose(found["codes"], expected["codes"], atol=1e-5)


@pytest.mark.parametrize("smooth", [False, True])
def test_selecting_with_and_without_sorting_gives_the_same(wide_system: Any, smooth: bool) -> None:
    plain = "select_smooth" if smooth else "select"
    backend = torch_backend(wide_system)
    ranked, halved = (run(backend, s, feeds(s, 36)) for s in (plain, f"{plain}_nucleus"))
    for name, array in ranked.items():
        np.testing.assert_array_equal(halved[name], array, err_msg=name)


@rtx
@pytest.mark.parametrize("stage", STAGES[2:])
def test_tensorrt_builds_what_draws_without_sorting(
    wide_system: Any, tmp_path: Path, stage: str
) -> None:
    whole = VAR.stages(wide_system.config, kv_layout="delta", dtype="float32")[stage]
    io = whole.io
    (sizes,) = whole.profiles(
        max_batch=4, static_batch=False, best_ranks=1, max_ranks=TENSORRT_RANKS
    )
    profile = {name: [list(each) for each in spans] for name, spans in io.profile(sizes).items()}
    model = graph_of(wide_system, stage, tmp_path, 18)
    build = replace(planned(io), profiles=(profile,), gpu_archs=("120",))
    check_graph(model, build)
    plan_file = tmp_path / "engine.plan"
    build_engine(build, model, plan_file, timeout_s=60, on_progress=lambda done, phase: None)
    assert 0 < plan_file.stat().st_size < 20 * 2**20


class _Noted(TorchBackend):
    """PyTorch that sorts no more than TensorRT, and says what it was asked for."""

    max_ranks = TENSORRT_RANKS

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.called: list[str] = []

    def run(self, stage: str, *args: Any) -> dict[str, Any]:
        self.called.append(stage)
        return super().run(stage, *args)


@pytest.fixture
def bounded(wide_system: Any) -> tuple[Pipeline, _Noted]:
    stages = VAR.learner.modules(wide_system, "delta")
    backend = _Noted(stages, declared(wide_system), kv_layout="delta", device="cpu")
    return Pipeline(VAR, wide_system.config, backend), backend


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        ({}, "select"),
        ({"top_p": 0.9, "top_k": 3000}, "select"),
        ({"top_p": 0.9}, "select_nucleus"),
        ({"top_p": 0.9, "more_smooth": True}, "select_smooth_nucleus"),
    ],
)
def test_only_top_p_alone_is_drawn_without_sorting(
    wide_system: Any, bounded: tuple[Pipeline, _Noted], settings: dict[str, Any], stage: str
) -> None:
    pipe, backend = bounded
    found, expected = (
        each.generate(class_ids=[1, 3], seed=2, trace=True, **settings)
        for each in (pipe, torch_pipeline(VAR, wide_system, device="cpu"))
    )
    assert {name for name in backend.called if name.startswith("select")} == {stage}
    assert found.trace is not None
    assert expected.trace is not None
    for tokens, others in zip(found.trace.tokens, expected.trace.tokens, strict=True):
        np.testing.assert_array_equal(tokens, others)


def test_a_top_k_that_cannot_be_sorted_is_refused(bounded: tuple[Pipeline, _Noted]) -> None:
    with pytest.raises(ConfigError, match=r"top_k=3840 is more than .* use at most 3839"):
        bounded[0].generate(class_ids=[1], top_k=3840)
