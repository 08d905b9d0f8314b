"""One TensorRT engine: its plan read from a file, its tensors, profiles and execution contexts.

TensorRT and TensorRT for RTX differ in their module name and in the runtime cache of RTX, a file
with the kernels that it compiles on this machine.
"""

import contextlib
import fcntl
import importlib
import logging
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nsp.backends.nvidia import find_gpu
from nsp.backends.tensorrt.cuda import Memory, Stream
from nsp.distribution import pip_install
from nsp.errors import BackendError, EngineError, ProfileError
from nsp.files import write_file
from nsp.stage.io import Shape, StageIO

logger = logging.getLogger(__name__)

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "BOOL": "bool",
}
# TensorRT's messages when GPU memory is exhausted; "memory" alone is also in other errors.
_MEMORY_HINTS = ("out of memory", "outofmemory", "memory allocation", "insufficient memory")


def import_tensorrt(module: str) -> Any:
    """Return the module `tensorrt` or `tensorrt_rtx`; BackendError if it cannot be loaded."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        advice = "it needs an NVIDIA GPU, which this machine does not have"
        if find_gpu() is not None:
            advice = f"run: {pip_install(module.replace('_', '-'))}"
        raise BackendError(
            f"{module} cannot be loaded ({' '.join(str(error).split())}); {advice}"
        ) from error


class Runtime:
    """Deserializes engines, and keeps TensorRT's errors."""

    def __init__(self, module: str, stream: Stream, cache_file: Path | None = None) -> None:
        """`cache_file` is for the kernels that TensorRT for RTX compiles here."""
        self.module, self.stream = module, stream
        self.trt = import_tensorrt(module)
        self._log = _new_log(self.trt)
        try:
            self._runtime = self.trt.Runtime(self._log)
        except (TypeError, RuntimeError) as error:  # the bindings raise these for a null pointer
            raise BackendError(f"{module} cannot start ({self.why()})") from error
        self._cache_file = cache_file
        self._cache: Any = None
        self._has_new_contexts = False

    def why(self) -> str:
        """Return the first error since the last call, in one line."""
        first = next(iter(self._log.errors), "no reason given")
        self._log.errors.clear()
        return " ".join(first.split())[:300]

    def engine(self, path: Path) -> Any:
        """Return the deserialized plan; its file is mapped, never copied to host memory.

        Raises EngineError when it is missing, damaged or for another machine, BackendError when
        it does not fit into the GPU's memory.
        """
        self._log.errors.clear()
        try:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as plan,
            ):
                engine = self._runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise EngineError(f"{path} cannot be read ({error})") from error
        if engine is not None:
            return engine
        version, reason = self.trt.__version__, self.why()
        if _is_exhausted(reason):
            free, total = self.stream.free_memory()
            size = path.stat().st_size
            raise BackendError(
                f"{self.module}: {path} has {size >> 20} MiB and does not fit into the GPU's "
                f"memory ({free >> 20} of {total >> 20} MiB are free); end other programs on the "
                "GPU, or export a smaller precision"
            )
        raise EngineError(
            f"{path} is damaged, or built for another GPU or version: {self.module} {version} "
            f"cannot load it ({reason})"
        )

    def context(self, engine: Any) -> Any:
        """Return a new execution context; the caller gives its scratch memory."""
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._has_cache():
            return engine.create_execution_context(strategy)
        self._has_new_contexts = True
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # Compile kernels at the first run for its sizes: a graph keeps the kernels it was
        # captured with, and kernels compiled later would come too late for it.
        kinds = self.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._read_cache()
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def _has_cache(self) -> bool:
        return hasattr(getattr(self.trt, "IRuntimeConfig", None), "create_runtime_cache")

    def _read_cache(self) -> None:
        if self._cache_file is None or not self._cache_file.is_file():
            return
        try:
            with _locked(self._cache_file):
                content = self._cache_file.read_bytes()
        except OSError as error:
            logger.warning("%s: no kernel cache (%s); compiling kernels again", self.module, error)
            return
        if self._cache.deserialize(content):
            logger.info("%s: compiled kernels from %s", self.module, self._cache_file)
        else:
            logger.warning(
                "%s is damaged or of another driver, GPU or version: %s compiles the kernels again",
                self._cache_file,
                self.module,
            )

    def save_cache(self) -> None:
        """Write newly compiled kernels to the cache file, if it is writable."""
        if not self._has_new_contexts or self._cache_file is None:
            return
        self._has_new_contexts = False
        content = bytes(memoryview(self._cache.serialize()))
        try:
            with _locked(self._cache_file):
                if self._cache_file.is_file() and self._cache_file.read_bytes() == content:
                    return
                with write_file(self._cache_file) as partial:
                    partial.write_bytes(content)
        except OSError as error:
            logger.info("compiled kernels cannot be kept: %s", error)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file that several processes read and replace."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f".{path.name}.lock").open("a")
    except OSError:  # a folder without write permission: nobody replaces the file
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Engine:
    """One stage: the tensors of its plan, and its profiles."""

    def __init__(self, stage: str, path: Path, declared: StageIO, runtime: Runtime) -> None:
        """Raises EngineError for a plan that cannot be loaded or is not of the declared stage."""
        self.stage, self.declared, self.runtime = stage, declared, runtime
        self.engine = runtime.engine(path)
        self.inputs = _tensors(self, path)
        # Smallest and largest shape of every input, for each profile.
        self.profiles = [self._bounds(i) for i in range(self.engine.num_optimization_profiles)]
        self._known: dict[Any, tuple[dict[str, Shape], int]] = {}

    @property
    def scratch_bytes(self) -> int:
        """Device memory a context needs while it runs, the largest of all profiles."""
        return int(self.engine.device_memory_size_v2)

    def _bounds(self, index: int) -> dict[str, tuple[Shape, Shape]]:
        bounds = {}
        for name in self.inputs:
            low, _, high = self.engine.get_tensor_profile_shape(name, index)
            bounds[name] = (tuple(low), tuple(high))
        return bounds

    def span(self, axis: str) -> tuple[int, int] | None:
        """Return the smallest and largest size of an axis in all profiles; None without it."""
        found = [
            (low, high)
            for bounds in self.profiles
            for name, span in bounds.items()
            for word, low, high in zip(self.declared.inputs[name].words, *span, strict=True)
            if word == axis
        ]
        if not found:
            return None
        return max(low for low, _ in found), min(high for _, high in found)

    def plan(self, feeds: Mapping[str, Any]) -> tuple[dict[str, Shape], int]:
        """Return the shapes of the outputs and the profile for these feeds.

        Raises FeedError for feeds that are not as declared, ProfileError for sizes that are in no
        profile.
        """
        key = tuple((name, array.shape, array.dtype) for name, array in feeds.items())
        found = self._known.get(key)
        if found is None:
            shapes = self.declared.output_shapes(self.declared.check(feeds, self.stage))
            found = shapes, self._profile({n: tuple(a.shape) for n, a in feeds.items()})
            self._known[key] = found
        return found

    def _profile(self, shapes: Mapping[str, Shape]) -> int:
        misfits = []
        for index, bounds in enumerate(self.profiles):
            outside = [name for name, span in bounds.items() if not _holds(span, shapes[name])]
            if not outside:
                return index
            misfits.append((len(outside), index, outside[0]))
        _, index, name = min(misfits)
        low, high = self.profiles[index][name]
        again = f"nsp export --target {self.runtime.module.replace('_', '-')} --max-batch N"
        advice = f"use a smaller --batch-size (or --top-k) or build larger engines: {again}"
        if any(size < least for size, least in zip(shapes[name], low, strict=False)):
            advice = (
                "engines built with --static-batch need guidance at every step: use a guidance "
                "scale other than 1 and no early end of guidance, or build engines without that "
                f"option: {again}"
            )
        raise ProfileError(
            f"{self.stage}: {name} {shapes[name]} fits none of the engine's "
            f"{len(self.profiles)} profiles, the nearest allows {low} to {high}; {advice}"
        )


def _holds(span: tuple[Shape, Shape], shape: Shape) -> bool:
    return len(shape) == len(span[0]) and all(
        low <= size <= high for low, size, high in zip(span[0], shape, span[1], strict=True)
    )


def _tensors(found: Engine, path: Path) -> list[str]:
    """Return the inputs of an engine; raise EngineError when it is not as declared.

    An unused input may be missing; an output may not.
    """
    trt, engine, declared = found.runtime.trt, found.engine, found.declared
    inputs: list[str] = []
    outputs: list[str] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        (inputs if is_input else outputs).append(name)
        spec = (declared.inputs if is_input else declared.outputs).get(name)
        dtype = _DTYPES.get(engine.get_tensor_dtype(name).name)
        on_device = engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
        if spec is None or dtype != spec.dtype or not on_device:
            raise EngineError(
                f"{path}: tensor {name!r} of stage {found.stage} is not as the manifest declares it"
            )
    if missing := declared.outputs.keys() - set(outputs):
        raise EngineError(f"{path}: stage {found.stage} has no output {min(missing)!r}")
    return inputs


class Context:
    """An execution context at one profile and shapes; addresses stay bound until they change."""

    def __init__(
        self, engine: Engine, profile: int, shapes: Mapping[str, Shape], scratch: Memory
    ) -> None:
        """Raises BackendError when TensorRT refuses."""
        self._engine, self._scratch = engine, scratch
        self._handle = engine.runtime.stream.handle
        self._context = engine.runtime.context(engine.engine)
        if self._context is None:
            self._fail("has no execution context")
        self._context.set_device_memory(scratch.address, scratch.num_bytes)
        if not self._context.set_optimization_profile_async(profile, self._handle):
            self._fail(f"refuses its profile {profile}")
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                self._fail(f"refuses {name} of shape {shape}")
        self._addresses: dict[str, int] = {}

    def run(self, addresses: Mapping[str, int]) -> None:
        """Enqueue the stage, all tensors being at `addresses`."""
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    self._fail(f"refuses the address of {name}")
                self._addresses[name] = address
        if not self._context.execute_async_v3(self._handle):
            self._fail("failed")

    def is_capturable(self) -> bool:
        """Return whether a CUDA graph can contain it; only TensorRT for RTX knows in advance."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(self._handle))

    def _fail(self, what: str) -> None:
        runtime, stage = self._engine.runtime, self._engine.stage
        reason = runtime.why()
        if _is_exhausted(reason):
            free, total = runtime.stream.free_memory()
            raise BackendError(
                f"{runtime.module}: out of GPU memory in stage {stage}: {free >> 20} of "
                f"{total >> 20} MiB are free; use a smaller --batch-size, or end other programs "
                f"on the GPU ({reason})"
            )
        raise BackendError(f"{runtime.module}: stage {stage} {what} ({reason})")


def _is_exhausted(reason: str) -> bool:
    return any(hint in reason.lower() for hint in _MEMORY_HINTS)


def _new_log(trt: Any) -> Any:
    """Return a logger that keeps errors and passes the rest to `logging`."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)
            logger.debug("%s: %s", trt.__name__, msg)

    return Log()
