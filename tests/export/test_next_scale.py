"""Every stage of the family `next_scale` is exported, held to PyTorch, and runs without it."""

import dataclasses
from pathlib import Path

import pytest

from nsp.export.compile.engine import build_engine
from nsp.export.graph.lint import check_graph
from nsp.export.graph.narrow import at_precision
from nsp.export.graph.onnx_export import export_stage
from nsp.export.options import ExportOptions
from nsp.export.plan import make_plan
from nsp.export.store import EngineStore
from nsp.families.next_scale.config import SIZES, NextScaleConfig
from nsp.family.contract import trace_sizes
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
