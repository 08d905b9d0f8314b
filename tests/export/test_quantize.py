"""What an int8 export promises: narrow products in the step, all else as in fp32, when asked."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from nsp.artifacts.manifest import Manifest, Variant
from nsp.benchmarks.contest.field import asked_for, make_ready, other_precisions
from nsp.benchmarks.contest.subject import load_subject
from nsp.errors import ConfigError
from nsp.export.graph.quantize import in_blocks, quantize_blocks
from nsp.export.options import ExportOptions
from nsp.export.proof.verify import verify
from nsp.export.run import export
from nsp.pipeline.pipeline import load_pipeline


@pytest.fixture(scope="module")
def int8_engines(
    half_engines: tuple[Path, Manifest],
    small_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("int8") / "engines"
    shutil.copytree(half_engines[0], folder)
    options = ExportOptions(
        checkpoint=str(small_checkpoint),
        engine_dir=str(folder),
        targets=("onnxruntime",),
        precisions=("int8",),
    )
    return folder, export(options)


def variant(manifest: Manifest, stage: str, precision: str) -> Variant:
    return next(v for v in manifest.stages[stage] if v.precision == precision)


def test_every_product_with_weights_in_the_step_is_of_integers(int8_engines):
    folder, manifest = int8_engines
    counts, said = {}, {}
    for precision in ("fp32", "int8"):
        model = onnx.load(folder / next(iter(variant(manifest, "step", precision).files)))
        said[precision] = {each.key: each.value for each in model.metadata_props}
        weights = {tensor.name for tensor in model.graph.initializer}
        nodes = [node for node in model.graph.node if "MatMul" in node.op_type]
        counts[precision] = Counter(
            node.op_type for node in nodes if weights & set(node.input) or "Integer" in node.op_type
        )
    assert counts["fp32"].keys() == {"MatMul"}
    assert counts["int8"] == {"MatMulInteger": counts["fp32"]["MatMul"]}
    assert not list((folder / "step").rglob("quantized*"))
    assert said["int8"] == said["fp32"]
    assert said["int8"]["stage"] == model.graph.name == "step"


def test_other_stages_are_those_of_fp32_and_the_figures_are_kept(int8_engines):
    _, manifest = int8_engines
    for stage in manifest.stages:
        narrow, wide = (variant(manifest, stage, precision) for precision in ("int8", "fp32"))
        assert (narrow.files == wide.files) == (stage != "step")
    step = variant(manifest, "step", "int8")
    assert set(step.precision_map.values()) == {"int8", "float32"}
    assert 1e-4 < step.parity["outputs"]["logits"]["relative"] < 0.05
    assert all(0.8 <= scale["agreement"] <= 1 for scale in step.parity["units"])


def test_verify_holds_each_stage_to_the_precision_it_is_stored_in(int8_engines):
    for recorded in (False, True):
        found = verify(int8_engines[0], precision="int8", recorded=recorded)
        assert found.failure() is None
        assert found.precision == "int8"


def test_it_runs_when_asked_for_and_only_then(int8_engines):
    folder, _ = int8_engines
    assert load_pipeline(folder, "onnxruntime", device="cpu").precision == "fp32"
    pipeline = load_pipeline(folder, "onnxruntime", device="cpu", precision="int8")
    assert pipeline.precision == "int8"
    assert pipeline.generate(prompts=["red apple"]).images.shape[0] == 1


def test_it_is_timed_in_the_same_rounds_with_what_its_gate_measured(int8_engines):
    folder, _ = int8_engines
    subject = load_subject(
        folder, checkpoint=None, backend="onnxruntime", precision=None, threads=1
    )
    settings = {"batches": (1,), "seed": 0, "on_start": lambda name: None}
    assert "int8" in other_precisions(subject)
    (ready,) = make_ready([asked_for("int8", subject, 1)], subject, **settings)
    entry = ready.entry
    assert (entry.name, entry.missing) == ("onnxruntime int8", None)
    assert "% of their range" in entry.what
    request = {**subject.conditions(1), "seed": 0}
    assert ready.runner.observe(request, number=0, place=0).stage_total_ms("step") > 0


def test_targets_without_it_say_so(small_checkpoint, tmp_path):
    options = ExportOptions(
        checkpoint=str(small_checkpoint),
        engine_dir=str(tmp_path / "engines"),
        targets=("tensorrt-rtx",),
        precisions=("int8",),
    )
    with pytest.raises(ConfigError, match=r"tensorrt-rtx has only .*, not int8"):
        export(options)


def test_blocks_of_weights_are_within_half_a_step_and_the_operator_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((200, 24)).astype(np.float32)  # a block and a part of one
    weight[:, 3] = 0
    codes, scales = in_blocks(weight)
    steps = np.repeat(scales, 128, axis=1)[:, :200].T
    read = (codes.reshape(24, -1)[:, :200].T.astype(np.float32) - 128) * steps
    assert (np.abs(read - weight) <= 0.5001 * steps).all()
    path = tmp_path / "model.onnx"
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = [helper.make_tensor_value_info(n, 1, ["rows", w]) for n, w in (("x", 200), ("y", 24))]
    weights = [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph([product], "product", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    quantize_blocks(path)
    assert {tensor.data_type for tensor in onnx.load(path).graph.initializer} == {1, 2}
    x = rng.standard_normal((2, 200)).astype(np.float32)
    (found,) = ort.InferenceSession(path).run(None, {"x": x})
    assert np.abs(found - x @ weight).max() < 0.02 * np.abs(x @ weight).max()
