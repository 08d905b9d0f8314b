"""What engine builds promise: real TensorRT-RTX engines without a GPU, or one clear line."""

import json
import platform
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import nsp.backends.available
import nsp.export.built_for
import nsp.export.compile.engine
import nsp.export.targets
from nsp.artifacts.engine_files import check_files
from nsp.artifacts.manifest import PRECISION_DTYPES
from nsp.backends.nvidia import Gpu
from nsp.distribution import pip_install
from nsp.errors import BackendError, ConfigError, ExportError
from nsp.export.compile.engine import build_engine
from nsp.export.graph.lint import check_graph
from nsp.export.graph.narrow import at_precision
from nsp.export.graph.onnx_export import export_stage
from nsp.export.options import ExportOptions
from nsp.export.run import export as run_export
from nsp.export.run import plan
from nsp.export.store import TIMING_CACHE
from nsp.families.var.config import with_condition
from nsp.family.classes import ClassCondition
from nsp.family.contract import trace_sizes
from nsp.family.registry import family
from nsp.stage.io import Axes, StageIO
from nsp.text.parts import TextEncoderSettings
from tests.export.small import compile_for_rtx, rtx, small_config, write_model
from tests.export.test_lint import planned
from tests.export.test_run import STAGES

IO = StageIO(inputs={"x": Axes("B 4")}, outputs={"y": Axes("B 4")})
CHILDREN = "tests.export.children"

WIDE = 300


def write_model_with_weights_beside(folder: Path) -> Path:
    """Write y = x W, its weights in a file of their own as for models beyond protobuf's 2 GB."""
    values = np.random.default_rng(0).standard_normal((4, WIDE * WIDE // 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["wide"]),
        helper.make_node("ReduceSum", ["wide", "last"], ["sum"], keepdims=1),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    initializers = [
        onnx.numpy_helper.from_array(values, "w"),
        onnx.numpy_helper.from_array(np.array([1]), "last"),
    ]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return folder / "model.onnx"


def run(folder: Path, **settings):
    """Build an engine of a small graph and return (engine, progress)."""
    progress: list[float] = []
    model = settings.pop("model", None) or write_model(folder, settings.pop("op", "Relu"))
    defaults = {"timeout_s": 60.0, "on_progress": lambda done, message: progress.append(done)}
    engine = build_engine(
        replace(planned(IO), gpu_archs=("80",)),
        model,
        folder / "engine.plan",
        **{**defaults, **settings},
    )
    return engine, progress


@rtx
def test_a_graph_becomes_an_engine_on_any_machine(tmp_path):
    engine, progress = run(tmp_path)
    assert engine.device["module"] == "tensorrt_rtx"
    assert engine.device["compute_capability"] == "8.0"
    assert engine.peak_mib > 50
    assert (tmp_path / "engine.plan").stat().st_size > 1000
    assert progress == sorted(progress)
    assert progress


@rtx
def test_an_operator_tensorrt_does_not_know_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"step \(tensorrt-rtx fp16\): .*cannot read .*Det"):
        run(tmp_path, op="Det")
    assert not (tmp_path / "engine.plan").exists()


@rtx
def test_an_architecture_of_another_release_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot build for GPU architecture 999"):
        compile_for_rtx(tmp_path, gpu_archs=["999"])


@pytest.mark.parametrize(
    ("child", "timeout_s", "message"),
    [
        ("crash", 60.0, r"the compiler crashed \(SIGSEGV\).*--target onnxruntime: last words"),
        ("killed", 60.0, "killed, most likely for lack of memory; use a smaller --max-batch"),
        ("sleep", 1.0, "took more than 1 s and was stopped"),
        ("quit", 60.0, "ended with exit code 7 and no result"),
        ("refuse", 60.0, r"step \(tensorrt-rtx fp16\): no such operator"),
    ],
)
def test_a_child_that_ends_badly_is_one_clear_line(
    tmp_path, child, timeout_s, message, monkeypatch
):
    monkeypatch.setattr(nsp.export.compile.engine, "_GRACE_S", 0.1)
    with pytest.raises(ExportError, match=message) as caught:
        run(tmp_path, child=f"{CHILDREN}.{child}", timeout_s=timeout_s)
    assert "\n" not in str(caught.value)


def test_ctrl_c_stops_the_child_in_order_and_leaves_no_engine(tmp_path):
    def interrupt(done: float, phase: str) -> None:
        raise KeyboardInterrupt

    cache = tmp_path / TIMING_CACHE
    cache.write_bytes(b"times of earlier builds")
    (tmp_path / f".{TIMING_CACHE}.7.partial").touch()  # as of a child killed while it wrote
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, child=f"{CHILDREN}.polite", on_progress=interrupt, timing_cache=cache)
    assert (tmp_path / "stopped").exists()
    assert {p.name for p in tmp_path.iterdir()} == {TIMING_CACHE, "model.onnx", "stopped"}
    assert cache.read_bytes() == b"times of earlier builds"


def test_the_timeout_stops_the_child_in_order(tmp_path):
    with pytest.raises(ExportError, match=r"took more than 0\.3 s and was stopped"):
        run(tmp_path, child=f"{CHILDREN}.polite", timeout_s=0.3)
    assert (tmp_path / "stopped").exists()


@rtx
def test_the_compiler_stops_when_asked(tmp_path):
    with pytest.raises(ExportError, match="the build was stopped"):
        compile_for_rtx(tmp_path, should_stop=lambda: True)
    assert not (tmp_path / "engine.plan").exists()


@rtx
def test_weights_outside_the_model_file_are_found_beside_it(tmp_path, monkeypatch):
    model = write_model_with_weights_beside(tmp_path / "graphs")
    assert model.stat().st_size < 1000
    monkeypatch.chdir(tmp_path)
    run(tmp_path, model=model)
    assert (tmp_path / "engine.plan").stat().st_size > 4 * WIDE**2
    (tmp_path / "graphs/model.onnx.data").unlink()
    with pytest.raises(ExportError, match=r"cannot read the graph: .*initializer: w") as caught:
        run(tmp_path, model=model)
    assert "\n" not in str(caught.value)


@rtx
def test_every_engine_of_every_stage_builds_without_a_gpu(small_checkpoint, tmp_path):
    folder = tmp_path / "engines"
    options = ExportOptions(
        checkpoint=str(small_checkpoint),
        engine_dir=str(folder),
        targets=("tensorrt-rtx",),
        precisions=("fp16",),
        max_batch=2,
        gpu_archs=("86", "120"),
    )
    events = []
    manifest = run_export(options, on_event=events.append)
    assert manifest.backends() == ("tensorrt_rtx",)
    assert tuple(manifest.stages) == STAGES
    for stage, (variant,) in manifest.stages.items():
        (name,) = variant.files
        assert name.endswith("/engine.plan"), stage
        check_files(folder, variant.files)
        scales = 3 if stage in ("step", "select", "select_smooth", "accumulate") else 1
        assert len(variant.profiles) == scales
        assert (variant.max_batch, variant.kv_layout, variant.opset) == (2, "delta", 18)
        assert variant.device["compute_capability"] == "8.6 12.0"
        assert variant.build_peak_mib > 50
        assert variant.tools["tensorrt_rtx"].startswith("1.")
        assert "ONNX Runtime" in variant.parity["checked"]
    assert not list(folder.rglob("*.onnx"))
    assert not (folder / TIMING_CACHE).exists()  # TensorRT-RTX tries no kernels
    assert any(event.phase == "build" and "Building" in event.message for event in events)
    assert {b.action for b in plan(options)} == {"reuse"}
    for change, reason in (
        ({"max_batch": 3}, "other batch or profile sizes"),
        ({"gpu_archs": ("89",)}, "built for compute_capability 8.6 12.0, not 8.9"),
    ):
        assert {(b.action, b.reason) for b in plan(replace(options, **change))} == {
            ("build", reason)
        }


@rtx
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_steps_build_in_the_other_precisions(tmp_path, precision):
    record = family("var")
    config = with_condition(small_config(), ClassCondition(num_classes=5))
    system = record.learner.new_system(config, TextEncoderSettings(), None)
    dtype = PRECISION_DTYPES[precision]
    declared = record.stages(system.config, kv_layout="delta", dtype=dtype)
    narrowed = at_precision(system, declared, precision)
    io = record.stages_io(system.config, kv_layout="delta", dtype=PRECISION_DTYPES[precision])[
        "step"
    ]
    sizes = {"G": 2, "L": 4, "P": 1}
    shapes = {name: [list(shape)] * 3 for name, shape in io.input_shapes(sizes).items()}
    model = export_stage(
        record.learner.modules(narrowed, "delta")["step"],
        io,
        tmp_path,
        name="step",
        opset=18,
        trace_sizes=trace_sizes(declared),
        metadata={},
    )
    check_graph(model, replace(planned(io), profiles=(shapes,), precision=precision))
    build = replace(planned(io), profiles=(shapes,), gpu_archs=("120",))
    plan_file = tmp_path / "engine.plan"
    build_engine(build, model, plan_file, timeout_s=60, on_progress=lambda done, phase: None)
    assert plan_file.stat().st_size > sum(p.nbytes for p in narrowed.predictor.head.parameters())


def test_an_engine_for_this_machine_is_not_that_of_another_gpu(small_checkpoint, monkeypatch):
    monkeypatch.setattr(nsp.export.targets, "is_installed", lambda target: True)
    options = ExportOptions(checkpoint=str(small_checkpoint), targets=("tensorrt",))

    def prints(capability: str, system: str = "Linux") -> list[str]:
        gpu = Gpu(name="a GPU", compute_capability=capability, driver_cuda="13.0")
        monkeypatch.setattr(nsp.export.built_for, "find_gpu", lambda: gpu)
        monkeypatch.setattr(platform, "system", lambda: system)
        return [build.fingerprint for build in plan(options)]

    assert prints("9.0") == prints("9.0")
    assert not set(prints("9.0")) & set(prints("8.9"))
    assert not set(prints("9.0")) & set(prints("9.0", "Windows"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"gpu_archs": ("89",)},
            "--gpu-arch is only for tensorrt-rtx engines.*targets are: onnxruntime",
        ),
        ({"static_batch": True}, "--static-batch is only for TensorRT engines"),
    ],
)
def test_an_option_no_target_heeds_is_refused(option, message):
    options = ExportOptions(checkpoint="none", targets=("onnxruntime",), **option)
    with pytest.raises(ConfigError, match=message):
        nsp.export.targets.resolve(options)


def test_a_target_that_is_not_installed_names_its_extra(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(nsp.export.targets, "is_installed", lambda target: False)
    options = ExportOptions(
        checkpoint=str(small_checkpoint), engine_dir=str(tmp_path / "e"), targets=("tensorrt",)
    )
    with pytest.raises(
        BackendError, match="run on an NVIDIA GPU, which this machine does not have"
    ):
        plan(options)
    gpu = Gpu("NVIDIA L4", "8.9", "13.0")
    monkeypatch.setattr(nsp.backends.available, "find_gpu", lambda: gpu)
    with pytest.raises(BackendError, match=re.escape(pip_install("tensorrt"))):
        plan(options)


def test_auto_is_what_this_machine_runs_and_more_where_it_is_named(
    small_checkpoint, monkeypatch, caplog
):
    monkeypatch.setattr(nsp.export.targets, "is_installed", lambda t: t.name != "tensorrt")
    monkeypatch.setattr(nsp.export.targets, "find_gpu", lambda: None)
    monkeypatch.setattr(nsp.export.targets, "_onnxruntime_has_gpu", lambda: False)
    caplog.set_level("INFO")

    def chosen(**changes):
        options = ExportOptions(checkpoint=str(small_checkpoint), precisions=("fp16",))
        return [(t.name, p) for t, p in nsp.export.targets.resolve(replace(options, **changes))]

    here = [("onnxruntime", "fp32"), ("onnxruntime", "fp16")]
    assert chosen() == here
    assert "add: --target auto --target tensorrt-rtx" in caplog.text
    more = [*here, ("tensorrt-rtx", "fp16")]
    assert chosen(targets=("auto", "tensorrt-rtx")) == more
    assert chosen(gpu_archs=("89",)) == more  # which only that target heeds
    with pytest.raises(ConfigError, match=r"bf16; --target tensorrt-rtx builds it for machines"):
        chosen(precisions=("bf16",))
    both = [("onnxruntime", "fp32"), ("tensorrt-rtx", "bf16")]
    assert chosen(precisions=("bf16",), targets=("auto", "tensorrt-rtx")) == both


def test_auto_adds_fp32_for_a_cpu_and_every_tensorrt_beside_a_gpu(small_checkpoint, monkeypatch):
    gpu = Gpu("NVIDIA L4", "8.9", "13.0")
    monkeypatch.setattr(nsp.export.targets, "find_gpu", lambda: gpu)
    monkeypatch.setattr(
        nsp.export.targets, "is_installed", lambda target: target.name != "tensorrt"
    )
    monkeypatch.setattr(nsp.export.targets, "_onnxruntime_has_gpu", lambda: False)
    options = ExportOptions(checkpoint=str(small_checkpoint), precisions=("fp16",))
    chosen = [(t.name, p) for t, p in nsp.export.targets.resolve(options)]
    onnx_pairs = [("onnxruntime", "fp32"), ("onnxruntime", "fp16")]
    assert chosen == [*onnx_pairs, ("tensorrt-rtx", "fp16")]
    monkeypatch.setattr(nsp.export.targets, "_onnxruntime_has_gpu", lambda: True)
    chosen = [(t.name, p) for t, p in nsp.export.targets.resolve(options)]
    assert chosen == [("onnxruntime", "fp16"), ("tensorrt-rtx", "fp16")]
    bf16 = replace(options, precisions=("bf16",))
    chosen = [(t.name, p) for t, p in nsp.export.targets.resolve(bf16)]
    assert chosen == [("onnxruntime", "fp32"), ("tensorrt-rtx", "bf16")]
    monkeypatch.setattr(nsp.export.targets, "is_installed", lambda t: t.name == "onnxruntime")
    with pytest.raises(ConfigError, match="no target that runs here has bf16"):
        nsp.export.targets.resolve(bf16)


def test_a_manifest_is_json_without_special_numbers(half_engines):
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((half_engines[0] / "manifest.json").read_text(), parse_constant=refuse)
