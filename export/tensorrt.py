"""ONNX graphs to engines with TensorRT or TensorRT for RTX: one code path, two module names.

Runs in a child process (build_child.py). TensorRT-RTX builds ahead of time for the architectures
named, without a GPU; TensorRT builds for the GPU of this machine.
"""

import importlib
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from nsp.errors import ConfigError, ExportError, MissingExtraError
from nsp.files import write_file
from nsp.runtime.nvidia import find_gpu

OnProgress: TypeAlias = Callable[[float, str], None]
Profile: TypeAlias = Mapping[str, Sequence[Sequence[int]]]  # input -> min, opt, max

_EXTRAS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}


def compile_engine(
    *,
    module: str,
    model: Path,
    plan: Path,
    profiles: Sequence[Profile],
    gpu_archs: Sequence[str],
    on_progress: OnProgress,
) -> dict[str, str]:
    """Write the engine of `model` to `plan` and return what it was built for.

    One optimization profile per entry of `profiles`, in order. Raises MissingExtraError when the
    module is absent, ConfigError for an architecture it does not build for, ExportError with
    TensorRT's own words when it refuses.
    """
    trt = _import(module)
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        problems = [_describe(parser.get_error(i)) for i in range(parser.num_errors)]
        raise ExportError(f"{module} cannot read the graph: {_one_line(problems)}")
    config = builder.create_builder_config()
    _set_archs(trt, config, gpu_archs)
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    for profile in profiles:
        config.add_optimization_profile(_profile(builder, profile, inputs))
    config.progress_monitor = _monitor(trt, on_progress)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"{module} cannot build an engine: {_one_line(log.errors)}")
    with write_file(plan) as partial:
        partial.write_bytes(engine)
    return {"module": module, "version": str(trt.__version__), **_target(gpu_archs)}


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(module, _EXTRAS[module]) from error
    except ImportError as error:  # a driver or CUDA library is missing
        raise ExportError(f"{module} is installed but does not load: {error}") from error


def _describe(error: Any) -> str:
    """Return a parser's error with its node; the description alone may be a bare word."""
    return f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}"


def _strongly_typed(trt: Any) -> int:
    """Return the network flags: types are those of the graph. TensorRT 10 needs to be told."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _set_archs(trt: Any, config: Any, gpu_archs: Sequence[str]) -> None:
    """Tell the builder which architectures to build for; without any it takes this machine's."""
    if not gpu_archs:
        return
    config.num_compute_capabilities = len(gpu_archs)
    for index, arch in enumerate(gpu_archs):
        name = "CURRENT" if arch == "current" else f"SM{arch}"
        capability = getattr(trt.ComputeCapability, name, None)
        if capability is None:
            raise ConfigError(f"this {trt.__name__} cannot build for GPU architecture {arch}")
        config.set_compute_capability(capability, index)


def _profile(builder: Any, sizes: Profile, inputs: Sequence[str]) -> Any:
    """Return one optimization profile; inputs the graph does not need are left out."""
    profile = builder.create_optimization_profile()
    for name in inputs:
        smallest, best, largest = (tuple(shape) for shape in sizes[name])
        profile.set_shape(name, smallest, best, largest)
    return profile


def _target(gpu_archs: Sequence[str]) -> dict[str, str]:
    """Return the machine an engine is for; the runtime refuses it on another (engine_choice.py)."""
    target = {"os": platform.system().lower(), "machine": platform.machine()}
    if gpu_archs and "current" not in gpu_archs:
        capabilities = [f"{arch[:-1]}.{arch[-1]}" for arch in gpu_archs]
        return {**target, "compute_capability": " ".join(capabilities)}
    gpu = find_gpu()
    return target if gpu is None else {**target, "compute_capability": gpu.compute_capability}


def _one_line(problems: Sequence[str]) -> str:
    """Return the first of TensorRT's messages, without its line breaks."""
    first = next((p for p in problems if p.strip()), "no reason given")
    return " ".join(first.split())[:300]


def _logger(trt: Any) -> Any:
    """Return a logger that keeps errors instead of printing them."""

    class Log(trt.ILogger):  # type: ignore[misc]  # a base known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _monitor(trt: Any, on_progress: OnProgress) -> Any:
    """Return a progress monitor that reports the outermost phase's share."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outer[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if steps := self.outer.get(phase_name):
                on_progress(min(1.0, (step + 1) / steps), phase_name)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.outer.pop(phase_name, None)

    return Monitor()
