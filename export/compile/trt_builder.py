"""ONNX graphs to engines with TensorRT or TensorRT for RTX: one code path, two module names.

Runs in a child process (build_child.py). TensorRT-RTX builds ahead of time for the architectures
named, without a GPU; TensorRT builds for the GPU of this machine, trying many kernels: how long
each took is kept in a timing cache, so that a later or a resumed build need not try them again.
"""

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from nsp.errors import ConfigError, ExportError, MissingExtraError
from nsp.export.built_for import built_for
from nsp.files import write_file

logger = logging.getLogger(__name__)

OnProgress: TypeAlias = Callable[[float, str], None]
Profile: TypeAlias = Mapping[str, Sequence[Sequence[int]]]  # input -> min, opt, max

# What TensorRT says, in one way or another, when the GPU's or the host's memory is exhausted.
_MEMORY_HINTS = ("out of memory", "outofmemory", "memory allocation", "insufficient memory")
_EXTRAS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}


def compile_engine(
    *,
    module: str,
    model: Path,
    plan: Path,
    profiles: Sequence[Profile],
    gpu_archs: Sequence[str],
    timing_cache: Path | None = None,
    on_progress: OnProgress,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Write the engine of `model` to `plan` and return what it was built for.

    One optimization profile per entry of `profiles`, in order. `timing_cache` is read, when it fits
    this GPU and version, and written, also by a build that fails or is stopped. Weights outside the
    model file are found beside it. Raises MissingExtraError when the module is absent, ConfigError
    for an architecture it does not build for, ExportError with TensorRT's own words when it refuses
    and when `should_stop`, asked at every step, says so.
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
    # On by default, TF32 rounds the inputs of float32 products to 10 bits, fp16's precision; what
    # is float32 in a graph is so because it decides tokens.
    config.clear_flag(trt.BuilderFlag.TF32)
    # TensorRT for RTX can put only such engines into CUDA graphs; full TensorRT needs no flag.
    if (flag := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        config.set_flag(flag)
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    for profile in profiles:
        config.add_optimization_profile(_profile(builder, profile, inputs))
    config.progress_monitor = _monitor(trt, on_progress, should_stop)
    with _timing_cache(config, timing_cache, log):
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(_refusal(module, log.errors, stopped=should_stop()))
    with write_file(plan) as partial:
        partial.write_bytes(engine)
    return {"module": module, "version": str(trt.__version__), **built_for(gpu_archs)}


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


@contextmanager
def _timing_cache(config: Any, path: Path | None, log: Any) -> Iterator[None]:
    """Let the builder use the times in the file `path`, and keep there what it measures.

    The file is replaced in one move, so that whatever ends the build leaves a whole one.
    """
    if path is None:
        yield
        return
    known = path.read_bytes() if path.is_file() else b""
    for content in (known, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            break
    if known and log.errors:
        logger.warning("%s is of another GPU or version, or damaged: started anew", path)
        log.errors.clear()  # they are not the build's
    try:
        yield
    finally:
        with write_file(path) as partial:
            partial.write_bytes(config.get_timing_cache().serialize())


def _refusal(module: str, problems: Sequence[str], *, stopped: bool) -> str:
    """Return one line about a build that gave no engine."""
    if stopped:
        return "the build was stopped"
    if any(hint in problem.lower() for problem in problems for hint in _MEMORY_HINTS):
        return (
            f"{module} ran out of memory while building; close what else uses the GPU, or use a "
            f"smaller --max-batch ({_one_line(problems)})"
        )
    return f"{module} cannot build an engine: {_one_line(problems)}"


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


def _monitor(trt: Any, on_progress: OnProgress, should_stop: Callable[[], bool]) -> Any:
    """Return a progress monitor that reports the outermost phase's share and can end the build."""

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
            return not should_stop()

        def phase_finish(self, phase_name: str) -> None:
            self.outer.pop(phase_name, None)

    return Monitor()
