"""What engine builds promise: real TensorRT-RTX engines without a GPU, or one clear line."""

import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

import export.engine
import export.targets
from export.engine import build_engine
from export.options import ExportOptions
from export.run import export as run_export
from export.run import plan
from export.tensorrt import compile_engine
from nsp.errors import BackendError, ConfigError, ExportError
from nsp.runtime.io import Axes, StageIO
from nsp.runtime.manifest import check_files
from tests.export.small import new_small_checkpoint
from tests.export.test_lint import planned

IO = StageIO(inputs={"x": Axes("B 4")}, outputs={"y": Axes("B 4")})
CHILDREN = "tests.export.children"

rtx = pytest.mark.skipif(
    not export.targets.is_installed(export.targets.TARGETS["tensorrt-rtx"]),
    reason="the tensorrt-rtx extra is not installed",
)


def write_model(folder: Path, op: str = "Relu", dtype: int = TensorProto.FLOAT, inputs: int = 1):
    nodes = [helper.make_node(op, ["x"] * inputs, ["y"])]
    tensors = [helper.make_tensor_value_info(name, dtype, ["B", 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:])
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def run(folder: Path, *, child: str = "export.build_child", timeout_s: float = 60.0, **model):
    """Build an engine of a small graph and return (engine, progress)."""
    progress: list[float] = []
    engine = build_engine(
        replace(planned(IO), gpu_archs=("80",)),
        write_model(folder, **model),
        folder / "engine.plan",
        timeout_s=timeout_s,
        on_progress=lambda done, message: progress.append(done),
        child=child,
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
    arguments = {"module": "tensorrt_rtx", "model": write_model(tmp_path)}
    with pytest.raises(ConfigError, match="cannot build for GPU architecture 999"):
        compile_engine(
            **arguments,
            plan=tmp_path / "engine.plan",
            profiles=[],
            gpu_archs=["999"],
            on_progress=lambda done, phase: None,
        )


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
def test_a_child_that_ends_badly_is_one_clear_line(tmp_path, child, timeout_s, message):
    with pytest.raises(ExportError, match=message) as caught:
        run(tmp_path, child=f"{CHILDREN}.{child}", timeout_s=timeout_s)
    assert "\n" not in str(caught.value)


@rtx
def test_a_whole_model_becomes_tensorrt_rtx_engines(tmp_path):
    checkpoint = new_small_checkpoint(tmp_path / "checkpoint", num_classes=5)
    folder = tmp_path / "engines"
    options = ExportOptions(
        checkpoint=str(checkpoint),
        engine_dir=str(folder),
        targets=("tensorrt-rtx",),
        precisions=("fp16",),
        max_batch=2,
        gpu_archs=("86",),
    )
    events = []
    manifest = run_export(options, on_event=events.append)
    assert manifest.backends() == ("tensorrt_rtx",)
    for stage, (variant,) in manifest.stages.items():
        (name,) = variant.files
        assert name.endswith("/engine.plan"), stage
        check_files(folder, variant.files)
        scales = 3 if stage in ("step", "select", "select_smooth", "accumulate") else 1
        assert len(variant.profiles) == scales
        assert (variant.max_batch, variant.kv_layout, variant.opset) == (2, "delta", 18)
        assert variant.device["compute_capability"] == "8.6"
        assert variant.build_peak_mib > 50
        assert variant.tools["tensorrt_rtx"].startswith("1.")
        assert "ONNX Runtime" in variant.parity["checked"]
    assert not list(folder.rglob("*.onnx"))
    assert any(event.phase == "build" and "Building" in event.message for event in events)
    assert {b.action for b in plan(options)} == {"reuse"}
    other = replace(options, max_batch=3)
    assert {(b.action, b.reason) for b in plan(other)} == {
        ("build", "other batch or profile sizes")
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"gpu_archs": ("89",)},
            "--gpu-arch is for tensorrt-rtx engines.*targets are: onnxruntime",
        ),
        ({"static_batch": True}, "--static-batch is for TensorRT engines"),
    ],
)
def test_an_option_no_target_heeds_is_refused(option, message):
    options = ExportOptions(checkpoint="none", targets=("onnxruntime",), **option)
    with pytest.raises(ConfigError, match=message):
        export.targets.resolve(options)


def test_a_target_that_is_not_installed_names_its_extra(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export.targets, "is_installed", lambda target: False)
    options = ExportOptions(
        checkpoint=str(small_checkpoint), engine_dir=str(tmp_path / "e"), targets=("tensorrt",)
    )
    with pytest.raises(BackendError, match=r"pip install 'nsp\[tensorrt\]'"):
        plan(options)


def test_auto_adds_fp32_for_a_cpu_and_every_installed_tensorrt(small_checkpoint, monkeypatch):
    monkeypatch.setattr(export.targets, "is_installed", lambda target: target.name != "tensorrt")
    monkeypatch.setattr(export.targets, "_onnxruntime_has_gpu", lambda: False)
    options = ExportOptions(checkpoint=str(small_checkpoint), precisions=("fp16",))
    chosen = [(t.name, p) for t, p in export.targets.resolve(options)]
    onnx_pairs = [("onnxruntime", "fp32"), ("onnxruntime", "fp16")]
    assert chosen == [*onnx_pairs, ("tensorrt-rtx", "fp16")]
    monkeypatch.setattr(export.targets, "_onnxruntime_has_gpu", lambda: True)
    chosen = [(t.name, p) for t, p in export.targets.resolve(options)]
    assert chosen == [("onnxruntime", "fp16"), ("tensorrt-rtx", "fp16")]
    bf16 = replace(options, precisions=("bf16",))
    chosen = [(t.name, p) for t, p in export.targets.resolve(bf16)]
    assert chosen == [("onnxruntime", "fp32"), ("tensorrt-rtx", "bf16")]
    monkeypatch.setattr(export.targets, "is_installed", lambda t: t.name == "onnxruntime")
    with pytest.raises(ConfigError, match="no installed target has bf16"):
        export.targets.resolve(bf16)


def fake_tensorrt(recorded: list[tuple[str, object]]) -> ModuleType:
    """Return a module with the part of TensorRT 10's API that a build uses."""

    class Config:
        progress_monitor = None

        def add_optimization_profile(self, profile):
            recorded.append(("profile", profile.shapes))

    class Builder:
        def __init__(self, log):
            self.log = log

        def create_network(self, flags):
            recorded.append(("flags", flags))
            return SimpleNamespace(num_inputs=1, get_input=lambda i: SimpleNamespace(name="x"))

        def create_builder_config(self):
            return Config()

        def create_optimization_profile(self):
            shapes = {}
            return SimpleNamespace(
                shapes=shapes, set_shape=lambda name, *bounds: shapes.update({name: bounds})
            )

        def build_serialized_network(self, network, config):
            config.progress_monitor.phase_start("Building", None, 2)
            config.progress_monitor.step_complete("Building", 0)
            config.progress_monitor.phase_finish("Building")
            if recorded[0] == ("refuse", True):
                self.log.log("error", "no GPU\nfound")
                return None
            return b"engine"

    module = ModuleType("tensorrt")
    logger = type("ILogger", (), {"ERROR": "error", "INTERNAL_ERROR": "internal"})
    vars(module).update(
        ILogger=logger,
        IProgressMonitor=type("IProgressMonitor", (), {}),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        Builder=Builder,
        OnnxParser=lambda network, log: SimpleNamespace(parse_from_file=lambda path: True),
        __version__="10.13",
    )
    return module


def compile_with_fake(tmp_path: Path):
    done: list[float] = []
    device = compile_engine(
        module="tensorrt",
        model=write_model(tmp_path),
        plan=tmp_path / "engine.plan",
        profiles=[{"x": [[1, 4], [2, 4], [2, 4]], "unused": [[1], [1], [1]]}],
        gpu_archs=[],
        on_progress=lambda share, phase: done.append(share),
    )
    return device, done


def test_full_tensorrt_takes_the_same_path(tmp_path, monkeypatch):
    recorded: list[tuple[str, object]] = [("refuse", False)]
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(recorded))
    device, done = compile_with_fake(tmp_path)
    assert (device["module"], device["version"]) == ("tensorrt", "10.13")
    assert (device["os"], device["machine"]) == (platform.system().lower(), platform.machine())
    assert done == [0.5]
    assert recorded[1:] == [("flags", 2), ("profile", {"x": ((1, 4), (2, 4), (2, 4))})]
    assert (tmp_path / "engine.plan").read_bytes() == b"engine"


def test_what_tensorrt_says_when_it_refuses_is_passed_on(tmp_path, monkeypatch):
    recorded: list[tuple[str, object]] = [("refuse", True)]
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(recorded))
    with pytest.raises(ExportError, match="tensorrt cannot build an engine: no GPU found"):
        compile_with_fake(tmp_path)
    assert not (tmp_path / "engine.plan").exists()


def test_a_manifest_is_json_without_special_numbers(half_engines):
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((half_engines[0] / "manifest.json").read_text(), parse_constant=refuse)
