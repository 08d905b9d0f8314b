"""How a TensorRT engine is compiled, on a stand-in for the part of its API that a build uses."""

import platform
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from nsp.errors import ExportError
from nsp.export.compile.trt_builder import compile_engine
from nsp.export.store import TIMING_CACHE
from tests.export.small import compile_for_rtx, polygraphy_for, rtx, write_model


def fake_tensorrt(recorded: list[tuple[str, object]]) -> ModuleType:
    """Return a module with the part of TensorRT 10's API that Polygraphy's build uses."""
    errors = []

    class Logger:
        VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR = range(5)

        def __init__(self):
            errors.append(lambda text: self.log(self.ERROR, text))

    class Cache:
        def __init__(self, content):
            self.content = content

        def serialize(self):
            return self.content + b"+measured"

    class Config:
        progress_monitor = None
        DLA_core, default_device_type, num_optimization_profiles = -1, "GPU", 1

        def create_timing_cache(self, content):
            return Cache(content)

        def set_timing_cache(self, cache, ignore_mismatch):
            assert ignore_mismatch is False
            fits = cache.content in (b"", b"times+measured")
            self.cache = cache if fits else None
            if not fits:
                errors[-1]("the timing cache is of another GPU")
            return fits

        def get_timing_cache(self):
            return self.cache

        def add_optimization_profile(self, profile):
            recorded.append(("profile", profile.shapes))

        def set_flag(self, flag):
            recorded.append(("flag", flag))

        def clear_flag(self, flag):
            recorded.append(("no flag", flag))

        def get_flag(self, flag):
            return False

    class Network(list):
        num_inputs = 1

        def get_input(self, index):
            return SimpleNamespace(name="x", is_shape_tensor=False, dtype="float", shape=(-1, 4))

    class Builder:
        def __init__(self, log):
            pass

        def create_network(self, flags):
            recorded.append(("flags", flags))
            return Network()

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
            if recorded[0][0] == "refuse":
                errors[-1](recorded[0][1])
                return None
            return b"engine"

    def enum(**members: int) -> SimpleNamespace:
        return SimpleNamespace(**members, __members__=members)

    module = ModuleType("tensorrt")
    vars(module).update(
        Logger=Logger,
        ILogger=Logger,
        IProgressMonitor=type("IProgressMonitor", (), {}),
        NetworkDefinitionCreationFlag=enum(STRONGLY_TYPED=1),
        BuilderFlag=enum(TF32=8),
        DeviceType=enum(GPU=0, DLA=1),
        ProfilingVerbosity=enum(LAYER_NAMES_ONLY=0, DETAILED=2),
        LayerType=enum(SHAPE=1),
        Builder=Builder,
        OnnxParser=lambda network, log: SimpleNamespace(
            parse_from_file=lambda path: True, num_errors=0
        ),
        init_libnvinfer_plugins=lambda log, namespace: True,
        __version__="10.13",
    )
    return module


def compile_with_fake(tmp_path: Path, **settings):
    done: list[float] = []
    with polygraphy_for("tensorrt"):
        device = compile_engine(
            module="tensorrt",
            model=write_model(tmp_path),
            plan=tmp_path / "engine.plan",
            profiles=[{"x": [[1, 4], [2, 4], [2, 4]], "unused": [[1], [1], [1]]}],
            gpu_archs=[],
            on_progress=lambda share, phase: done.append(share),
            **settings,
        )
    return device, done


def test_full_tensorrt_takes_the_same_path(tmp_path, monkeypatch):
    recorded: list[tuple[str, object]] = [("build", None)]
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(recorded))
    device, done = compile_with_fake(tmp_path)
    assert (device["module"], device["version"]) == ("tensorrt", "10.13")
    assert (device["os"], device["machine"]) == (platform.system().lower(), platform.machine())
    assert done == [0.5]
    profile = ("profile", {"x": ((1, 4), (2, 4), (2, 4))})
    assert recorded[1:] == [("flags", 2), profile, ("no flag", 8)]
    assert (tmp_path / "engine.plan").read_bytes() == b"engine"


def test_engines_are_built_for_cuda_graphs_where_that_must_be_asked_for(tmp_path, monkeypatch):
    recorded: list[tuple[str, object]] = [("build", None)]
    module = fake_tensorrt(recorded)
    module.BuilderFlag.REQUIRE_USER_ALLOCATION = 7
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    compile_with_fake(tmp_path)
    assert ("flag", 7) in recorded
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert hasattr(rtx.BuilderFlag, "REQUIRE_USER_ALLOCATION")


@rtx
def test_float32_products_are_not_rounded(tmp_path, monkeypatch):
    import tensorrt_rtx as trt

    class Builder:
        def __init__(self, log):
            self.real = real(log)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def build_serialized_network(self, network, config):
            flags.append(config.get_flag(trt.BuilderFlag.TF32))
            return self.real.build_serialized_network(network, config)

    flags: list[bool] = []
    real = trt.Builder
    monkeypatch.setattr(trt, "Builder", Builder)
    compile_for_rtx(tmp_path)
    assert flags == [False]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("no GPU\nfound", "^tensorrt cannot build an engine: no GPU found$"),
        ("Cuda Runtime (out of memory)", "ran out of memory while building.*smaller --max-batch"),
    ],
)
def test_what_tensorrt_says_when_it_refuses_is_passed_on(tmp_path, monkeypatch, said, message):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt([("refuse", said)]))
    with pytest.raises(ExportError, match=message):
        compile_with_fake(tmp_path)
    assert not (tmp_path / "engine.plan").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, b"+measured"),
        (b"times+measured", b"times+measured+measured"),
        (b"of another GPU", b"+measured"),
    ],
)
@pytest.mark.parametrize("outcome", ["build", "refuse"])
def test_kernel_times_are_kept_for_the_next_build(
    tmp_path, monkeypatch, caplog, before, after, outcome
):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt([(outcome, "no memory left")]))
    path = tmp_path / TIMING_CACHE
    if before is not None:
        path.write_bytes(before)
    if outcome == "build":
        compile_with_fake(tmp_path, timing_cache=path)
    else:
        with pytest.raises(ExportError, match="no memory left"):  # not what is wrong with the file
            compile_with_fake(tmp_path, timing_cache=path)
    assert path.read_bytes() == after
    assert ("starting a new one" in caplog.text) == (before == b"of another GPU")


@rtx
def test_a_damaged_timing_cache_is_replaced_by_a_whole_one(tmp_path):
    """By the same functions in TensorRT-RTX, where they still are and do nothing else."""
    path = tmp_path / TIMING_CACHE
    path.write_bytes(b"damaged" * 100)
    for _ in range(2):
        compile_for_rtx(tmp_path, timing_cache=path)
        assert path.read_bytes().startswith(b"ptrt")
