"""Every stage of the family `next_scale` is exported, held to PyTorch, and runs without it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from nsp.artifacts.manifest import Manifest
from nsp.benchmarks import bench
from nsp.benchmarks.options import QUICK, BenchOptions
from nsp.export.compile.engine import build_engine
from nsp.export.graph.lint import check_graph
from nsp.export.graph.narrow import at_precision
from nsp.export.graph.onnx_export import export_stage
from nsp.export.options import ExportOptions
from nsp.export.plan import make_plan
from nsp.export.run import export
from nsp.export.store import EngineStore
from nsp.families.next_scale.config import SIZES, NextScaleConfig
from nsp.family.contract import trace_sizes
from nsp.pipeline.pipeline import load_pipeline
from tests.families.next_scale.models import new_tiny_checkpoint

PROMPTS = ["red apple", ""]


def small_config() -> NextScaleConfig:
    """Return the fewest parts: a block each, two predictors, of which only the first has keys."""
    tiny = SIZES["tiny"]
    generator = dataclasses.replace(
        tiny.generator, width=8, num_heads=2, num_blocks=1, flow_steps=2, attn_max_size=2
    )
    return dataclasses.replace(tiny, generator=generator)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_tiny_checkpoint(tmp_path_factory.mktemp("next") / "checkpoint", small_config())


@pytest.fixture(scope="module")
def engines(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("next") / "engines"
    options = ExportOptions(
        checkpoint=str(checkpoint), engine_dir=str(folder), targets=("onnxruntime",)
    )
    return folder, export(options)


def test_stages_pass_their_gates_and_what_they_cache_is_compared(
    engines: tuple[Path, Manifest],
) -> None:
    stages = engines[1].stages
    assert list(stages) == [
        *("text_encoder", "condition", "base", "predictor_0", "predictor_1", "refine", "decoder")
    ]
    measured = stages["predictor_0"][0].parity["outputs"]
    assert set(measured) == {"new_latent", "new_k_0", "new_v_0"}
    assert max(each["relative"] for each in measured.values()) < 1e-4
    assert stages["decoder"][0].parity["psnr_db"] > 80
    assert stages["decoder"][0].parity["calls"] == 6  # every scale of two batches
    assert stages["decoder"][0].parity["free_running"]["lowest_psnr_db"] > 80
    assert {variants[0].kv_layout for variants in stages.values()} == {"delta"}


def test_engines_make_pytorchs_picture_scale_by_scale(
    engines: tuple[Path, Manifest], checkpoint: Path
) -> None:
    pipeline, reference = load_pipeline(engines[0]), load_pipeline(checkpoint, device="cpu")
    steps = zip(
        pipeline.stream(prompts=PROMPTS, seed=3),
        reference.stream(prompts=PROMPTS, seed=3),
        strict=True,
    )
    for found, expected in steps:
        np.testing.assert_allclose(found.latent, expected.latent, rtol=1e-3, atol=1e-3)
        assert found.decode().shape == expected.decode().shape
    one, two = (pipeline.generate(prompts=PROMPTS, seed=3).images for _ in range(2))
    assert np.array_equal(one, two)


def test_engines_are_timed_beside_pytorch_though_they_draw_no_tokens(
    engines: tuple[Path, Manifest],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = {"candidate_processes": 0, "baseline_processes": 0, "gemm_side": 64}
    monkeypatch.setattr("nsp.benchmarks.options.QUICK", {**QUICK, **few})
    options = BenchOptions(
        engine_dir=engines[0],
        output_dir=tmp_path,
        checkpoint=checkpoint,
        quick=True,
        rounds=2,
        batch_sizes=(1,),
        rivals=("plain-onnx",),
    )
    result = bench.run(options).result
    assert [row.name for row in result.batches[0].rows][:-2] == list(engines[1].stages)
    assert all(row.speedup for row in result.batches[0].rows)
    assert (result.model.schedule, result.model.num_tokens) == ((2, 4, 8), 84)
    assert result.parity is None
    assert result.batches[0].scale_rows == ()
    assert result.rivals[0].missing == "the cache of family next_scale is not joined in a graph"
    assert "nsp verify" in (tmp_path / "bench.md").read_text()


def test_a_predictor_with_a_past_builds_for_tensorrt_without_a_gpu(
    checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    options = ExportOptions(
        checkpoint=str(checkpoint),
        engine_dir=str(tmp_path / "engines"),
        targets=("tensorrt-rtx",),
        precisions=("fp16",),
    )
    plan = make_plan(options, EngineStore(tmp_path / "engines"))
    build = next(each for each in plan.builds if each.stage == "predictor_1")
    system, family = plan.record.load(), plan.record.family
    declared = family.stages(plan.config, kv_layout=build.kv_layout, dtype="float16")
    narrow = at_precision(system, declared, "fp16")
    model = export_stage(
        family.learner.modules(narrow, build.kv_layout)[build.stage],
        build.io,
        tmp_path,
        name=build.stage,
        opset=build.opset,
        trace_sizes=trace_sizes(declared),
        metadata={},
    )
    check_graph(model, build)
    engine = build_engine(
        build, model, tmp_path / "engine.plan", timeout_s=300, on_progress=lambda *_: None
    )
    assert (tmp_path / "engine.plan").stat().st_size > 0
    assert engine.device
