"""The registry of backends: a record of each, and whether it works on this machine.

Another package declares its BackendRecord like this, and nothing here changes:

    [project.entry-points."nsp.backends"]
    my_backend = "my_package:RECORD"
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from nsp.backends.nvidia import find_gpu
from nsp.distribution import installed_version, pip_install
from nsp.errors import ConfigError, lacks_memory
from nsp.plugins import Plugins

Device: TypeAlias = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Availability:
    """Whether a backend works on this machine, in words for a user."""

    works: bool
    reason: str  # what it runs on, or why it does not work
    install: str | None = None  # the command that would make it work, or work better
    device: Device | None = None  # where it would run
    detail: Mapping[str, str] = field(default_factory=dict)  # versions and the like


@dataclass(frozen=True, kw_only=True)
class BackendRecord:
    """One backend."""

    name: str
    runs: Literal["checkpoints", "engines"]
    module: str  # the optional package it needs
    distributions: tuple[str, ...]  # names under which pip knows that package
    extra: str | None = None  # the extra of this project that installs it; None: always required
    needs_gpu: bool = False  # useless on a machine without an NVIDIA GPU
    needs: str  # in words
    probe: Callable[["BackendRecord"], Availability]
    # "module:name" of (stage files, stages' I/O, kv_layout, device, num_threads) -> Backend;
    # None: it runs no engines.
    loader: str | None
    # Precisions it runs on each device, best first; fp16 is computed through casts on a CPU.
    precisions: Mapping[Device, tuple[str, ...]] = field(
        default_factory=lambda: {"cuda": ("fp16", "bf16", "fp32")}
    )
    engines_of: str | None = None  # the backend whose engines it runs; None: its own
    portable: bool = True  # False: engines fit one GPU architecture, library version and OS
    build_needs_gpu: bool = False

    @property
    def built_for(self) -> str:
        """The backend that a manifest names for the engines it runs."""
        return self.name if self.engines_of is None else self.engines_of

    @property
    def install(self) -> str | None:
        """The command that installs the package; None if that would be useless."""
        if self.needs_gpu and find_gpu() is None:
            return None
        return f"pip install {self.module}" if self.extra is None else pip_install(self.extra)

    @property
    def repair(self) -> str | None:
        """The command that repairs a damaged installation; None if that would be useless."""
        return _reinstall_onnxruntime() if self.name == "onnxruntime" else self.install

    def load(self) -> Any:
        """Return the function that loads engines, importing its module now."""
        assert self.loader is not None
        module, _, name = self.loader.partition(":")
        return getattr(importlib.import_module(module), name)

    def version(self) -> str | None:
        """Return the version of the installed package, or None; nothing is imported."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:  # a folder left behind has no origin
            return None
        return self.recorded_version() or "unknown"

    def recorded_version(self) -> str | None:
        """Return the version that pip has recorded, even if the module is missing."""
        return next(
            (found for name in self.distributions if (found := installed_version(name))), None
        )


def backend_record(name: str) -> BackendRecord:
    """Return the record of a backend ("tensorrt-rtx" and "tensorrt_rtx" are the same).

    Raises ConfigError naming the known ones.
    """
    plain = name.replace("-", "_")
    if plain in BACKENDS:
        return BACKENDS[plain]
    found = _PLUGINS.load(plain)
    if found is None:
        raise ConfigError(f"unknown backend {name!r}; known: auto, {', '.join(backend_names())}")
    if not isinstance(found, BackendRecord) or found.name != plain:
        raise ConfigError(f"backend {plain!r}: {found!r} is not a BackendRecord of that name")
    return found


def backend_names() -> list[str]:
    """Return the names of all backends: the built-in ones, then those of other packages.

    One that cannot be used is left out with a warning.
    """
    return _PLUGINS.usable(backend_record)


def availability(name: str) -> Availability:
    """Return whether a backend works on this machine; never raises."""
    try:
        record = backend_record(name)
    except ConfigError as error:
        return Availability(False, str(error))
    try:
        if record.version() is not None:
            return record.probe(record)
        if record.recorded_version() is None or importlib.util.find_spec(record.module) is None:
            needs = f"{record.module} is not installed; {record.needs}"
            return Availability(False, needs, record.install)
        reason = (
            f"{record.module} is only partly installed: pip lists it, but its files are missing"
        )
    except Exception as error:  # importing a broken installation may raise anything
        if lacks_memory(error):
            reason = f"there is not enough memory to load {record.module} ({error})"
            return Availability(False, " ".join(reason.split()))
        reason = (
            f"{record.module} is installed but cannot be loaded: {type(error).__name__}: {error}"
        )
    return Availability(False, " ".join(reason.split()), record.repair)


def _probe_torch(record: BackendRecord) -> Availability:
    import torch

    cuda = torch.cuda.is_available()
    detail = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    where = f"GPU {torch.cuda.get_device_name()}" if cuda else "CPU"
    install = None
    if not cuda and (gpu := find_gpu()) is not None:
        install = "pip install --force-reinstall 'torch>=2.11,<2.14'"
        where += f"; this machine has {gpu.name}, but this build of torch cannot use it"
    device: Device = "cuda" if cuda else "cpu"
    return Availability(True, f"runs checkpoints on the {where}", install, device, detail)


def _probe_onnxruntime(record: BackendRecord) -> Availability:
    from nsp.backends.onnxruntime.ort_backend import CUDA, cuda_starts, import_onnxruntime

    ort = import_onnxruntime()
    built_for_cuda = CUDA in ort.get_available_providers()
    cuda, gpu = cuda_starts(ort), find_gpu()
    detail = {
        "onnxruntime": ort.__version__,
        "providers": ", ".join(ort.get_available_providers()),
    }
    device: Device = "cuda" if cuda else "cpu"
    reason = f"runs engines on the GPU {gpu.name}" if cuda and gpu else "runs engines on the CPU"
    install = None
    if all(installed_version(name) for name in ("onnxruntime", "onnxruntime-gpu")):
        # Both use the folder onnxruntime/: the one installed last overwrites the other, and
        # removing either breaks the other.
        reason += "; onnxruntime and onnxruntime-gpu are both installed and overwrite each other"
        if gpu:
            install = _reinstall_onnxruntime()
        else:
            reason += ", which works until one of them is removed"
    elif gpu and not cuda:
        if built_for_cuda:
            reason += (
                f"; its CUDA provider cannot start on {gpu.name} (perhaps CUDA or cuDNN is missing)"
            )
            install = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        else:
            reason += f"; this machine has {gpu.name}, but onnxruntime without -gpu cannot use it"
            install = _reinstall_onnxruntime()
    return Availability(True, reason, install, device, detail)


def _reinstall_onnxruntime() -> str:
    """Return the command that installs the ONNX Runtime that suits this machine.

    The two packages have their files in one folder, so on a machine with a GPU both are removed
    before the GPU package is installed. Elsewhere either works, and pip downloads it before it
    removes anything, so without a network the present installation stays.
    """
    if find_gpu() is None:
        return "pip install --force-reinstall --no-deps onnxruntime"
    return "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def _probe_tensorrt(record: BackendRecord) -> Availability:
    """Return whether engines can be built and run.

    The module (0.6 s, and 500 MB of libraries) is imported only if it may be able to run.
    """
    gpu = find_gpu()
    detail = {record.module: record.version() or "unknown"}
    builds = not record.build_needs_gpu or gpu is not None
    can = "builds engines on this machine" if builds else "cannot build engines on this machine"
    if gpu is None:
        return Availability(
            False, f"{can} and cannot run them: no NVIDIA driver", None, None, detail
        )
    detail |= {
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "driver_cuda": gpu.driver_cuda,
    }
    needed = _cuda_needed(record)
    if int(gpu.driver_cuda.split(".")[0]) < needed:
        reason = (
            f"{can} and cannot run them: the driver of {gpu.name} is for CUDA {gpu.driver_cuda}, "
            f"but {record.module} needs one for CUDA {needed}.0 or later"
        )
        return Availability(False, reason, None, "cuda", detail)
    if not _has_cuda_bindings():
        reason = f"{can} and cannot run them: the package cuda-bindings is not installed"
        return Availability(False, reason, record.install, "cuda", detail)
    from nsp.backends.tensorrt.trt_backend import why_not_here

    if reason := why_not_here(record.module):
        return Availability(False, f"{can} and cannot run them: {reason}", None, "cuda", detail)
    return Availability(True, f"runs engines on the GPU {gpu.name}", None, "cuda", detail)


def _cuda_needed(record: BackendRecord) -> int:
    """Return the major CUDA version that an installed package is built for."""
    name = next((name for name in record.distributions if installed_version(name)), "")
    return 12 if name.endswith("cu12") else 13


def _has_cuda_bindings() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        return False


# In order of preference for `--backend auto`.
BACKENDS: Mapping[str, BackendRecord] = {
    record.name: record
    for record in (
        BackendRecord(
            name="tensorrt",
            runs="engines",
            module="tensorrt",
            distributions=("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
            extra="tensorrt",
            needs_gpu=True,
            needs="it needs an NVIDIA GPU to build and to run engines",
            probe=_probe_tensorrt,
            loader="nsp.backends.tensorrt.trt_backend:load_tensorrt",
            portable=False,
            build_needs_gpu=True,
        ),
        BackendRecord(
            name="tensorrt_rtx",
            runs="engines",
            module="tensorrt_rtx",
            distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
            extra="tensorrt-rtx",
            needs_gpu=True,
            needs="it builds engines on any machine and needs an NVIDIA RTX GPU to run them",
            probe=_probe_tensorrt,
            loader="nsp.backends.tensorrt.trt_backend:load_tensorrt_rtx",
            portable=False,
        ),
        BackendRecord(
            name="onnxruntime",
            runs="engines",
            module="onnxruntime",
            distributions=("onnxruntime-gpu", "onnxruntime"),
            needs="it runs on any CPU, and on NVIDIA GPUs as onnxruntime-gpu",
            probe=_probe_onnxruntime,
            loader="nsp.backends.onnxruntime.ort_backend:load_engines",
            precisions={"cpu": ("fp32", "fp16", "int8"), "cuda": ("fp16", "fp32")},
        ),
        BackendRecord(
            name="torch",
            runs="checkpoints",
            module="torch",
            distributions=("torch",),
            extra="export",
            needs="it runs checkpoints, on a CPU or a GPU",
            probe=_probe_torch,
            loader=None,
            precisions={"cpu": ("fp32",), "cuda": ("fp32",)},
        ),
    )
}
_PLUGINS = Plugins("nsp.backends", dict.fromkeys(BACKENDS, ""))  # the built-in ones are here
