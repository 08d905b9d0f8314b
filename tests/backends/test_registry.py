"""What the registry promises: an answer for every backend on every machine, never an exception."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from nsp.backends import available as registry
from nsp.backends.available import BACKENDS, availability, backend_record
from nsp.backends.nvidia import Gpu
from nsp.backends.onnxruntime import ort_backend as onnxruntime
from nsp.backends.tensorrt import trt_backend as tensorrt
from nsp.distribution import pip_install
from nsp.errors import BackendError, ConfigError

H200 = Gpu(name="NVIDIA H200", compute_capability="9.0", driver_cuda="13.0")

ANEW = "pip install --force-reinstall --no-deps onnxruntime"
ANEW_FOR_THE_GPU = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


class Machine:
    """Pretends that other packages and another GPU are here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.installed: dict[str, str] = {}
        monkeypatch.setattr(registry, "installed_version", self.installed.get)
        self.set_gpu(None)

    def set_gpu(self, gpu: Gpu | None) -> None:
        self.monkeypatch.setattr(registry, "find_gpu", lambda: gpu)
        self.monkeypatch.setattr(onnxruntime, "find_gpu", lambda: gpu)

    def install(self, module: str, **distributions: str) -> None:
        """Pretend that `module` is there under the given pip names (with _ for -)."""
        self.installed |= {name.replace("_", "-"): v for name, v in distributions.items()}
        found = importlib.util.find_spec

        def find_spec(name: str) -> object:
            return types.SimpleNamespace(origin="there") if name == module else found(name)

        self.monkeypatch.setattr(registry.importlib.util, "find_spec", find_spec)

    def install_onnxruntime(self, *, providers: list[str], starts: bool = False) -> None:
        module = types.ModuleType("onnxruntime")
        module.__version__ = "1.31.1"  # type: ignore[attr-defined]
        module.InferenceSession = object  # type: ignore[attr-defined]
        module.get_available_providers = lambda: providers  # type: ignore[attr-defined]
        self.monkeypatch.setitem(sys.modules, "onnxruntime", module)
        self.monkeypatch.setattr(onnxruntime, "cuda_starts", lambda ort: starts)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_an_answer_here(name: str) -> None:
    found = availability(name)
    assert found.reason
    assert "\n" not in found.reason
    if found.works:
        assert found.device in ("cpu", "cuda")
        assert found.detail


def test_an_unknown_backend_is_an_answer_too() -> None:
    found = availability("openvino")
    assert not found.works
    assert "unknown backend 'openvino'" in found.reason
    with pytest.raises(ConfigError, match="known: auto, tensorrt, tensorrt_rtx, onnxruntime"):
        backend_record("openvino")


def test_both_spellings_name_one_backend() -> None:
    assert backend_record("tensorrt-rtx") is backend_record("tensorrt_rtx")


@pytest.mark.parametrize("name", BACKENDS)
def test_an_absent_package_comes_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, BACKENDS[name].module, None)
    monkeypatch.setattr(registry, "find_gpu", lambda: H200)
    found = availability(name)
    assert not found.works
    assert "is not installed" in found.reason
    assert found.install is not None
    assert found.install.startswith("pip install")


@pytest.mark.parametrize("error", [ImportError("libfoo.so.1 is missing"), OSError(8, "bad ELF")])
def test_a_broken_package_is_a_reason_not_an_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(record: object) -> None:
        raise error

    broken = registry.BackendRecord(
        **{**vars(BACKENDS["onnxruntime"]), "probe": fail}  # type: ignore[arg-type]
    )
    monkeypatch.setattr(registry, "BACKENDS", {"onnxruntime": broken})
    found = availability("onnxruntime")
    assert not found.works
    assert "cannot be loaded" in found.reason
    assert found.install == ANEW


def test_what_pip_leaves_behind_is_not_an_installation(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "onnxruntime")
    found = availability("onnxruntime")
    assert found.reason.startswith("onnxruntime is not installed")
    assert found.install == "pip install onnxruntime"
    # pip uninstall onnxruntime, beside onnxruntime-gpu, takes the files of both.
    machine.installed["onnxruntime-gpu"] = "1.31.1"
    found = availability("onnxruntime")
    assert found.reason.startswith("onnxruntime is only partly installed")
    assert found.install == ANEW
    with pytest.raises(BackendError, match="onnxruntime does not load"):
        onnxruntime.import_onnxruntime()


def test_tensorrt_rtx_without_a_driver_builds_and_does_not_run(machine: Machine) -> None:
    machine.install("tensorrt_rtx", tensorrt_rtx_cu13="1.7.1.116")
    machine.monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    found = availability("tensorrt-rtx")
    assert not found.works
    assert found.reason == "builds engines on this machine and cannot run them: no NVIDIA driver"
    assert found.detail["tensorrt_rtx"] == "1.7.1.116"
    assert "tensorrt_rtx" not in sys.modules  # 0.6 s and 500 MB of libraries for one sentence


@pytest.fixture
def with_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_has_cuda_bindings", lambda: True)


@pytest.mark.usefixtures("with_bindings")
@pytest.mark.parametrize("problem", ["", "tensorrt: no CUDA-capable device"])
def test_tensorrt_with_a_gpu_runs_there_or_says_why_not(machine: Machine, problem: str) -> None:
    machine.install("tensorrt", tensorrt_cu13="11.4.0")
    machine.set_gpu(H200)
    machine.monkeypatch.setattr(tensorrt, "why_not_here", lambda module: problem)
    found = availability("tensorrt")
    assert (found.works, found.device) == (not problem, "cuda")
    assert (problem or "runs engines on the GPU NVIDIA H200") in found.reason
    assert found.detail["compute_capability"] == "9.0"


def test_tensorrt_without_the_cuda_bindings_names_the_extra_that_has_them(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.install("tensorrt_rtx", tensorrt_rtx_cu13="1.7.1")
    machine.set_gpu(H200)
    monkeypatch.setattr(registry, "_has_cuda_bindings", lambda: False)
    found = availability("tensorrt-rtx")
    assert "cuda-bindings" in found.reason
    assert found.install == pip_install("tensorrt-rtx")


def test_a_driver_too_old_for_the_package_is_named(machine: Machine) -> None:
    machine.install("tensorrt", tensorrt_cu13="11.4.0")
    machine.set_gpu(Gpu(name="NVIDIA L4", compute_capability="8.9", driver_cuda="12.8"))
    found = availability("tensorrt")
    assert not found.works
    assert "for CUDA 12.8, but tensorrt needs one for CUDA 13.0 or later" in found.reason


def test_tensorrt_without_a_gpu_cannot_even_build(machine: Machine) -> None:
    machine.install("tensorrt", tensorrt_cu13="11.4.0")
    assert availability("tensorrt").reason.startswith("cannot build engines on this machine")


def test_onnxruntime_beside_onnxruntime_gpu_is_reported_with_the_fix(machine: Machine) -> None:
    machine.install("onnxruntime", onnxruntime="1.31.1", onnxruntime_gpu="1.31.1")
    machine.install_onnxruntime(providers=[onnxruntime.CPU])
    found = availability("onnxruntime")
    assert found.works
    assert "both installed" in found.reason
    assert found.install is None  # it works, and uninstalling either would end that
    machine.set_gpu(H200)
    assert availability("onnxruntime").install == ANEW_FOR_THE_GPU


def test_onnxruntime_for_the_cpu_on_a_machine_with_a_gpu_says_how_to_use_it(
    machine: Machine,
) -> None:
    machine.install("onnxruntime", onnxruntime="1.31.1")
    machine.install_onnxruntime(providers=[onnxruntime.CPU])
    machine.set_gpu(H200)
    found = availability("onnxruntime")
    assert (found.works, found.device) == (True, "cpu")
    assert "this machine has NVIDIA H200" in found.reason
    assert found.install is not None
    assert found.install.endswith("pip install onnxruntime-gpu")


def test_a_cuda_provider_that_does_not_start_is_not_called_working(machine: Machine) -> None:
    machine.install("onnxruntime", onnxruntime_gpu="1.31.1")
    machine.install_onnxruntime(providers=[onnxruntime.CUDA, onnxruntime.CPU])
    machine.set_gpu(H200)
    found = availability("onnxruntime")
    assert found.device == "cpu"
    assert "CUDA provider cannot start" in found.reason


def test_a_cuda_provider_that_starts_runs_on_the_gpu(machine: Machine) -> None:
    machine.install("onnxruntime", onnxruntime_gpu="1.31.1")
    machine.install_onnxruntime(providers=[onnxruntime.CUDA, onnxruntime.CPU], starts=True)
    machine.set_gpu(H200)
    found = availability("onnxruntime")
    assert (found.device, found.install) == ("cuda", None)
    assert found.reason == "runs engines on the GPU NVIDIA H200"


def test_the_version_is_that_of_the_installed_package() -> None:
    import onnxruntime as installed

    assert backend_record("onnxruntime").version() == installed.__version__
