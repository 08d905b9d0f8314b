"""What exported graphs promise: PyTorch's tokens at every size, the same bytes every time."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.distribution import version
from nsp.export.graph.onnx_export import WEIGHTS_NAME, export_stage
from nsp.export.options import ExportOptions
from nsp.export.plan import make_plan
from nsp.export.store import EngineStore
from nsp.family.contract import trace_sizes
from nsp.family.registry import family
from nsp.pipeline.pipeline import load_pipeline

VAR = family("var")
SETTINGS = [
    {},
    {"guidance_scale": 1.0},
    {"top_k": 1},
    {"top_k": 5, "top_p": 0.9},
    {"top_p": 0.8},
    {"more_smooth": True},
    {"guidance_scale": 3.0, "guidance_schedule": "interval", "guidance_interval": (0.5, 1.0)},
]


@pytest.fixture(scope="module")
def pipelines(half_engines, small_checkpoint):
    return load_pipeline(small_checkpoint), load_pipeline(half_engines[0], "onnxruntime")


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_engines_sample_the_tokens_of_pytorch(pipelines, batch, settings):
    """The first scale has no past and one token; a batch of one without guidance has one row."""
    prompts = ["red apple", "snow-capped mountain", "cat"][:batch]
    expected, found = (
        pipeline.generate(prompts=prompts, seed=7, trace=True, **settings).trace
        for pipeline in pipelines
    )
    for scale, (a, b) in enumerate(zip(expected.tokens, found.tokens, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"scale {scale}")
    np.testing.assert_allclose(found.image, expected.image, atol=1e-5)


def export_one(stage: str, system, folder: Path, *, opset: int = 18, layout: str = "delta") -> Path:
    modules = VAR.learner.modules(system, layout)
    declared = VAR.stages(system.config, kv_layout=layout, dtype="float32")
    folder.mkdir(parents=True)
    return export_stage(
        modules[stage],
        declared[stage].io,
        folder,
        name=stage,
        opset=opset,
        trace_sizes=trace_sizes(declared),
        metadata={"stage": stage, "family": "var"},
    )


def test_a_second_export_writes_the_same_bytes_and_no_paths(system, tmp_path):
    first, second = (export_one("accumulate", system, tmp_path / n) for n in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert b".py" not in first.read_bytes()
    assert str(Path.cwd()).encode() not in first.read_bytes()


def test_large_weights_lie_beside_the_graph(system, tmp_path, monkeypatch):
    monkeypatch.setattr("nsp.export.graph.onnx_export._INLINE_BYTES", 0)
    path = export_one("accumulate", system, tmp_path / "a")
    assert (tmp_path / "a" / WEIGHTS_NAME).stat().st_size > 500
    onnx.checker.check_model(path)


def test_names_and_axes_are_the_declared_ones(half_engines):
    folder, manifest = half_engines
    for stage, variants in manifest.stages.items():
        graph = onnx.load(folder / next(iter(variants[0].files))).graph
        io = variants[0].stage_io
        assert [value.name for value in graph.input] == list(io.inputs), stage
        assert [value.name for value in graph.output] == list(io.outputs), stage
        assert spelled(graph) == [
            spec.words for spec in (*io.inputs.values(), *io.outputs.values())
        ]


def spelled(graph: onnx.GraphProto) -> list[tuple[str, ...]]:
    """Return the axes of the inputs and outputs in words."""
    return [
        tuple(dim.dim_param or str(dim.dim_value) for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output)
    ]


def test_sums_of_axes_are_spelled_as_declared(system, tmp_path):
    path = export_one("step", system, tmp_path / "a", opset=23, layout="present")
    assert spelled(onnx.load(path).graph)[-1] == ("G", "2", "P+L", "16")


def test_a_graph_says_which_model_and_stage_it_is(half_engines, system):
    folder, manifest = half_engines
    for stage, variants in manifest.stages.items():
        for variant in variants:
            model = onnx.load(folder / next(iter(variant.files)))
            assert model.graph.name == stage
            assert {each.key: each.value for each in model.metadata_props} == {
                "family": "var",
                "stage": stage,
                "model_hash": manifest.model_hash,
                "schedule": "1x1 2x2 3x3",
                "nsp_version": version(),
            }


def test_trace_sizes_tell_all_axes_of_a_stage_apart(system):
    for layout in ("delta", "present"):
        declared = VAR.stages(system.config, kv_layout=layout, dtype="float32")
        sizes = trace_sizes(declared)
        for stage, each in declared.items():
            chosen = [sizes[axis] for axis in each.io.free_axes]
            assert min(chosen) >= 2, stage
            assert len(set(chosen)) == len(chosen), stage


@pytest.mark.parametrize("static", [False, True])
def test_profiles_hold_every_size_of_the_schedule(small_checkpoint, tmp_path, static):
    """Checked with the calls PyTorch makes, not with the formulas of the profiles."""
    pytest.importorskip("tensorrt_rtx", reason="the tensorrt-rtx extra is not installed")
    from nsp.export.proof.reference import record_reference

    options = ExportOptions(
        checkpoint=str(small_checkpoint),
        engine_dir=str(tmp_path / "engines"),
        targets=("tensorrt-rtx",),
        max_batch=7,
        static_batch=static,
    )
    plan = make_plan(options, EngineStore(tmp_path / "engines"))
    builds = {build.stage: build for build in plan.builds}
    reference = record_reference(plan, read_checkpoint(small_checkpoint).load())
    guided, *others = reference.batches
    assert len(guided.orders) == 7  # a full batch
    for batch in (guided,) if static else (guided, *others):
        seen: dict[str, int] = {}
        for call in batch.recording.calls:
            profiles = builds[call.stage].profiles
            profile = profiles[seen.get(call.stage, 0)] if len(profiles) > 1 else profiles[0]
            seen[call.stage] = seen.get(call.stage, 0) + 1
            for name, array in call.feeds.items():
                low, _, high = (np.array(bound) for bound in profile[name])
                assert (low <= array.shape).all(), (call.stage, name)
                assert (high >= array.shape).all(), (call.stage, name)
    lengths = [profile["x"][1][1] for profile in builds["step"].profiles]
    past = [profile["past_k_0"][1][0] for profile in builds["step"].profiles]
    assert (lengths, past) == ([1, 4, 9], [0, 1, 5])
    rows = builds["step"].profiles[0]["x"]
    assert [bound[0] for bound in rows] == ([14, 14, 14] if static else [1, 14, 14])
