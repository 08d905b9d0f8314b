"""Builds engines from ONNX graphs with TensorRT or TensorRT for RTX, using Polygraphy.

It runs in a child process (build_child.py), which selects TensorRT or TensorRT for RTX before
Polygraphy is imported. TensorRT-RTX builds for the given architectures, without a GPU; TensorRT
builds for the GPU of this machine and tries many kernels.

We do these things ourselves, because Polygraphy cannot do them:
- progress and stopping on request: it accepts a monitor but has none;
- the timing cache: it writes one only after success, and uses a damaged one without a warning;
- architectures: its RTX config takes given ones or this machine's, never both, and keeps TF32 on;
- several execution contexts: its runner has one (nsp/backends runs engines without it).
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

# TensorRT's messages when the memory of the GPU or the host is exhausted.
_MEMORY_HINTS = ("out of memory", "outofmemory", "memory allocation", "insufficient memory")
_EXTRAS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt", "polygraphy": "export"}


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
    """Write the engine of `model` to `plan` and return the machine that it was built for.

    It has one optimization profile per entry of `profiles`, in order. `timing_cache` is read if it
    fits this GPU and version, and written, also by a build that fails or is stopped. External
    weights are read from the folder of the model file. Raises MissingExtraError when the module is
    absent, ConfigError for an architecture it cannot build for, ExportError with TensorRT's message
    when it refuses, and when `should_stop`, called at every step, returns True.
    """
    trt = _import(module)
    polygraphy = _import("polygraphy.backend.trt")
    assert polygraphy.tensorrt_module_and_version_string().startswith(f"{module}>")
    from polygraphy.exception import PolygraphyException

    with _errors() as problems:
        try:
            builder, network, _ = parts = polygraphy.network_from_onnx_path(
                str(model),
                # TensorRT 10 needs to be told that types are those of the graph.
                strongly_typed=hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"),
            )
        except PolygraphyException as error:
            told = [each for each in problems if each.startswith("In node")] or problems
            raise ExportError(f"{module} cannot read the graph: {_one_line(told)}") from error
        inputs = [network.get_input(i).name for i in range(network.num_inputs)]
        # This turns off TF32, which rounds the inputs of float32 products to 10 bits, the precision
        # of fp16. Tensors of a graph are float32 because they decide tokens.
        config = polygraphy.create_config(
            builder,
            network,
            profiles=[_profile(polygraphy, sizes, inputs) for sizes in profiles],
            profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
            progress_monitor=_monitor(trt, on_progress, should_stop),
        )
        _set_archs(trt, config, gpu_archs)
        # TensorRT for RTX can put only such engines into CUDA graphs; full TensorRT needs no flag.
        if (flag := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
            config.set_flag(flag)
        with _timing_cache(config, timing_cache, problems):
            try:
                engine = polygraphy.engine_bytes_from_network(parts, config=config)
            except PolygraphyException as error:
                refusal = _refusal(module, problems, stopped=should_stop())
                raise ExportError(refusal) from error
    with write_file(plan) as partial:
        partial.write_bytes(engine)
    return {"module": module, "version": str(trt.__version__), **built_for(gpu_archs)}


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        raise MissingExtraError(name, _EXTRAS[name]) from error
    except ImportError as error:  # a driver or CUDA library is missing
        raise ExportError(f"{module} is installed but cannot be loaded: {error}") from error


def _set_archs(trt: Any, config: Any, gpu_archs: Sequence[str]) -> None:
    """Set the architectures to build for; without any, the builder uses this machine's GPU."""
    if not gpu_archs:
        return
    config.num_compute_capabilities = len(gpu_archs)
    for index, arch in enumerate(gpu_archs):
        name = "CURRENT" if arch == "current" else f"SM{arch}"
        capability = getattr(trt.ComputeCapability, name, None)
        if capability is None:
            raise ConfigError(f"this {trt.__name__} cannot build for GPU architecture {arch}")
        config.set_compute_capability(capability, index)


def _profile(polygraphy: ModuleType, sizes: Profile, inputs: Sequence[str]) -> Any:
    """Return one optimization profile, without inputs that the graph does not have."""
    profile = polygraphy.Profile()
    for name in inputs:
        profile.add(name, *map(tuple, sizes[name]))
    return profile


@contextmanager
def _timing_cache(config: Any, path: Path | None, problems: list[str]) -> Iterator[None]:
    """Let the builder use the times in the file `path`, and store its measurements there.

    The file is replaced atomically, so that it is complete however the build ends.
    """
    if path is None:
        yield
        return
    known = path.read_bytes() if path.is_file() else b""
    for content in (known, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            break
    if known and problems:
        logger.warning("%s is for another GPU or version, or damaged; starting a new one", path)
        problems.clear()  # they do not belong to the build
    try:
        yield
    finally:
        with write_file(path) as partial:
            partial.write_bytes(config.get_timing_cache().serialize())


def _refusal(module: str, problems: Sequence[str], *, stopped: bool) -> str:
    """Return one line about a build without a result."""
    if stopped:
        return "the build was stopped"
    if any(hint in problem.lower() for problem in problems for hint in _MEMORY_HINTS):
        return (
            f"{module} ran out of memory while building; end other programs on the GPU, or use a "
            f"smaller --max-batch ({_one_line(problems)})"
        )
    return f"{module} cannot build an engine: {_one_line(problems)}"


def _one_line(problems: Sequence[str]) -> str:
    """Return the first of TensorRT's messages, without its line breaks."""
    first = next((p for p in problems if p.strip()), "no reason given")
    return " ".join(first.split())[:300]


@contextmanager
def _errors() -> Iterator[list[str]]:
    """Yield a list that collects TensorRT's errors; none of its messages is printed."""
    from polygraphy.logger import G_LOGGER

    problems: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno == logging.ERROR:  # higher levels are Polygraphy's summaries, less exact
            problems.append(record.getMessage())
        return False

    G_LOGGER.use_python_logging_system = True
    G_LOGGER.colors = G_LOGGER.letter = False
    G_LOGGER.python_logger.addFilter(keep)
    try:
        yield problems
    finally:
        G_LOGGER.python_logger.removeFilter(keep)


def _monitor(trt: Any, on_progress: OnProgress, should_stop: Callable[[], bool]) -> Any:
    """Return a progress monitor that reports the outermost phase and can stop the build."""

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
