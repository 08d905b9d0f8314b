"""The `onnxruntime` backend: ONNX stages on a CPU, or on an NVIDIA GPU with onnxruntime-gpu.

Arrays are on the device where the stages run (ort_arrays.py): inputs are read and outputs written
in place, and on a GPU the cache and all tensors between stages stay there. `run` returns when the
stage has ended, so arrays can be read at any time; stages do not overlap.

CUDA graphs are an option, off by default until they are measured: a stage is replayed if its arrays
have the same addresses and shapes as in an earlier run. ONNX Runtime captures a stage only if all
of it runs on the GPU; other stages run without a graph, which is logged.
"""

import contextlib
import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from nsp import cores
from nsp.backends.nvidia import find_gpu
from nsp.backends.onnxruntime.ort_arrays import DeviceMemory, HostMemory, Memory
from nsp.backends.onnxruntime.ort_cuda import CPU, CUDA, CudaGraphs, with_options
from nsp.backends.onnxruntime.ort_session import collapse, own_memory, session_options
from nsp.errors import BackendError, EngineError, FeedError, lacks_memory
from nsp.stage.arena import KVArena, KVShape
from nsp.stage.backend import Backend, Loop, T
from nsp.stage.io import Shape, StageIO

__all__ = [
    "CPU",
    "CUDA",
    "OnnxRuntimeBackend",
    "choose_providers",
    "cuda_starts",
    "import_onnxruntime",
    "load_engines",
]

logger = logging.getLogger(__name__)

_ONNX_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "bool": "tensor(bool)",
}
# y = Relu(x), float[1], opset 13, as an ONNX file.
_ONE_NODE = (
    b'\x08\x08:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
# Sizes repeat from image to image; there are as many as scales times batch sizes.
_MAX_KNOWN_FEEDS = 4096
_BATCH_OF_LARGE_PAGES = 2


class OnnxRuntimeBackend(Backend):
    """Runs one ONNX Runtime session per stage.

    Sessions are created in the background, in the order given, so that the first stage can run
    while the last one loads. Weights are read from the files and never held by Python.
    """

    name: ClassVar[str] = "onnxruntime"

    def __init__(
        self,
        stage_files: Mapping[str, Path],
        stages_io: Mapping[str, StageIO],
        *,
        kv_layout: str,
        providers: Sequence[str] | None = None,
        num_threads: int | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """Start loading `stage_files`, one ONNX model per stage.

        `providers`: ONNX Runtime's names, best first; None is CUDA if it starts, otherwise the CPU.
        `num_threads`: None means as `cores.num_threads` decides. `cuda_graphs` has an effect only
        with the CUDA provider. Raises BackendError without onnxruntime or a requested provider,
        EngineError for an unsupported tensor type and ConfigError for a number of threads below 1;
        `wait` or `run` reports a model that cannot be loaded.
        """
        super().__init__(stages_io)
        ort = import_onnxruntime()
        self._ort, self.kv_layout = ort, kv_layout
        self.providers = choose_providers(ort, providers)
        self.num_threads = cores.num_threads(num_threads)
        self._errors = _error_types(ort)
        on_gpu = self.providers[0] == CUDA
        if on_gpu and kv_layout == "in_place":
            logger.warning(
                "onnxruntime: the attention of these engines runs on the CPU, and their cache is "
                "copied for every token; for a GPU, export with --fp16"
            )
        self.memory: Memory = DeviceMemory(ort, "cuda", self._errors) if on_gpu else HostMemory(ort)
        self._graphs = CudaGraphs(ort) if on_gpu and cuda_graphs else None
        self._known_feeds: dict[Any, dict[str, Shape]] = {}
        self._idle_arenas: dict[KVShape, KVArena] = {}
        # Memory of others, until it is time to look at our own: the second batch.
        self._plays, self._others_memory = 0, [] if on_gpu else own_memory()
        for stage, declared in stages_io.items():
            _check_types(stage, declared)
        loader = ThreadPoolExecutor(max_workers=2, thread_name_prefix="nsp-load")
        self._sessions: dict[str, Future[Any]] = {
            stage: loader.submit(self._load, stage, path) for stage, path in stage_files.items()
        }
        loader.shutdown(wait=False)

    def when_loaded(self, call: Callable[[], None]) -> None:
        """Call `call` when every session is loaded or has failed, from the last thread."""
        waiting, lock = set(self._sessions), threading.Lock()

        def end(stage: str, _: Future[Any]) -> None:
            with lock:
                waiting.discard(stage)
                is_last = not waiting
            if is_last:
                call()

        for stage, session in self._sessions.items():
            session.add_done_callback(partial(end, stage))

    def wait(self) -> None:
        """Wait until every session is loaded; raise EngineError or BackendError if one fails."""
        for session in self._sessions.values():
            session.result()

    def run(
        self, stage: str, feeds: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return all outputs, each in the array given for it or in a new one the caller owns."""
        results = self._result_arrays(stage, feeds, outputs or {})
        session = self._sessions[stage].result()
        inputs = [argument.name for argument in session.get_inputs()]
        options = None
        if self._graphs is not None:
            options = self._graphs.run_options(stage, [*map(feeds.get, inputs), *results.values()])
        try:
            binding = session.io_binding()  # one per call (2 us): it keeps no array alive
            self.memory.bind(binding, inputs, feeds, results)
            session.run_with_iobinding(binding, options)
        except self._errors as error:
            raise BackendError(f"onnxruntime: {_failure(stage, error)}") from error
        return results

    def play(self, name: str, inputs: Mapping[str, NDArray[Any]], loop: Loop[T]) -> Iterator[T]:
        """Yield the results of `loop`.

        Before the second batch, or the first one after it with all stages loaded, the weights are
        put on large pages: this takes about 0.1 s, which a process that makes one batch would not
        get back.
        """
        self._plays += 1
        is_loaded = all(session.done() for session in self._sessions.values())
        if self._others_memory and self._plays >= _BATCH_OF_LARGE_PAGES and is_loaded:
            collapse(self._others_memory)
            self._others_memory = []
        return super().play(name, inputs, loop)

    def _result_arrays(
        self, stage: str, feeds: Mapping[str, Any], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Check feeds and given arrays, and return the array for each output."""
        declared = self.stages_io[stage]
        # Checking twenty tensors takes 0.3 ms, looking up their shapes and dtypes only 5 us.
        key = (stage, *((name, a.shape, a.dtype) for name, a in feeds.items()))
        shapes = self._known_feeds.get(key)
        if shapes is None:
            shapes = declared.output_shapes(declared.check(feeds, stage))
            if len(self._known_feeds) < _MAX_KNOWN_FEEDS:
                self._known_feeds[key] = shapes
        if unknown := given.keys() - shapes.keys():
            raise FeedError(f"{stage}: unknown output {min(unknown)!r}; known: {', '.join(shapes)}")
        results, contiguous = {}, self.memory.is_contiguous
        for name, shape in shapes.items():
            array, dtype = given.get(name), declared.outputs[name].dtype
            if array is None:
                array = self.allocate(shape, dtype)
            elif array.shape != shape or array.dtype != dtype or not contiguous(array):
                raise FeedError(
                    f"{stage}: the array for {name} is {array.dtype} {array.shape}; "
                    f"expected {dtype} {shape}, contiguous"
                )
            results[name] = array
        return results

    def upload(self, array: NDArray[Any]) -> Any:
        """Return the array on the device of the stages; on a CPU a contiguous one is not copied."""
        return self.memory.upload(array)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy."""
        return self.memory.download(array)

    def allocate(self, shape: Shape, dtype: str) -> Any:
        """Return uninitialised memory; raise BackendError when there is not enough."""
        return self.memory.allocate(shape, dtype)

    def copy_rows(self, source: Any, target: Any) -> None:
        """Fill `target` (P, N, ...) with the first N of `source` (P, G, ...)."""
        self.memory.copy_rows(source, target)

    @contextlib.contextmanager
    def arena(self, shape: KVShape) -> Iterator[KVArena]:
        """Lend an empty arena: the last one if it is idle and has this shape, or a new one.

        The first access to new memory is slow: 50 ms per image of w512, which has twice 44 MB.
        """
        arena = self._idle_arenas.pop(shape, None) or self.new_arena(shape)
        arena.clear()
        try:
            yield arena
        finally:
            self._idle_arenas = {shape: arena}  # only one, so that a larger one is freed

    def _load(self, stage: str, path: Path) -> Any:
        """Return the session of one stage."""
        ort = self._ort
        options = session_options(ort, self.num_threads)
        try:
            session = self._new_session(stage, path, options)
        except self._errors as error:
            if lacks_memory(error):
                raise BackendError(
                    f"onnxruntime: not enough memory to load {path} ({_first_line(error)}); free "
                    "some, or raise the limit of this process"
                ) from error
            raise EngineError(
                f"{path} cannot be loaded by onnxruntime {ort.__version__} ({_first_line(error)}); "
                "export its folder again (nsp inspect names the checkpoint)"
            ) from error
        if session.get_providers()[0] != self.providers[0]:
            raise BackendError(
                f"onnxruntime: {self.providers[0]} is installed but does not start here (driver, "
                f"CUDA or cuDNN); run nsp doctor, or load with providers=['{CPU}']"
            )
        self._check_signature(stage, path, session)
        return session

    def _new_session(self, stage: str, path: Path, options: Any) -> Any:
        new = self._ort.InferenceSession
        if self._graphs is not None:
            try:
                return new(path, options, providers=with_options(self.providers, graphs=True))
            except self._errors as error:
                logger.info("onnxruntime: no CUDA graph of %s: %s", stage, _first_line(error))
                self._graphs.leave_out(stage)
        return new(path, options, providers=with_options(self.providers, graphs=False))

    def _check_signature(self, stage: str, path: Path, session: Any) -> None:
        """Raise EngineError where a model's inputs and outputs are not the declared ones.

        A model may lack an input: one the computation does not need is dropped by the exporter.
        """
        declared = self.stages_io[stage]
        found_inputs, found_outputs = (
            {argument.name: argument.type for argument in arguments}
            for arguments in (session.get_inputs(), session.get_outputs())
        )
        inputs = {name: _ONNX_TYPES[spec.dtype] for name, spec in declared.inputs.items()}
        outputs = {name: _ONNX_TYPES[spec.dtype] for name, spec in declared.outputs.items()}
        differing = (found_inputs.items() - inputs.items()) | (
            found_outputs.items() ^ outputs.items()
        )
        if differing:
            name = min(differing)[0]
            raise EngineError(
                f"{path}: tensor {name!r} of stage {stage} is not as the manifest declares it; "
                "export its folder again (nsp inspect names the checkpoint)"
            )


def load_engines(
    stage_files: Mapping[str, Path],
    stages_io: Mapping[str, StageIO],
    *,
    kv_layout: str,
    device: str,
    num_threads: int | None = None,
) -> OnnxRuntimeBackend:
    """Return the backend of an engine folder's stages, on the "cpu" or on "cuda"."""
    return OnnxRuntimeBackend(
        stage_files,
        stages_io,
        kv_layout=kv_layout,
        providers=(CUDA,) if device == "cuda" else (CPU,),
        num_threads=num_threads,
    )


def import_onnxruntime() -> Any:
    """Return the module; raise BackendError when it is absent or broken."""
    try:
        import onnxruntime
        from onnxruntime import InferenceSession  # noqa: F401  # else a folder left by pip
    except ImportError as error:
        if lacks_memory(error):
            raise BackendError(
                f"there is not enough memory to load onnxruntime ({_first_line(error)})"
            ) from error
        raise BackendError(
            f"onnxruntime cannot be loaded ({_first_line(error)}); "
            "run: pip install onnxruntime (for an NVIDIA GPU onnxruntime-gpu; never both)"
        ) from error
    return onnxruntime


def choose_providers(ort: Any, wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the providers to use, the CPU last; raise BackendError naming an absent one."""
    if wanted is None:
        return (CUDA, CPU) if cuda_starts(ort) else (CPU,)
    available = ort.get_available_providers()
    if missing := [name for name in wanted if name not in available]:
        known = ", ".join(available)
        raise BackendError(f"onnxruntime has no provider {missing[0]} here; it has {known}")
    return tuple(dict.fromkeys([*wanted, CPU]))


@cache
def cuda_starts(ort: Any) -> bool:
    """Return whether the CUDA provider runs here.

    Being compiled in does not mean that it starts: driver, CUDA and cuDNN are found at run time,
    and ONNX Runtime quietly uses the CPU without them. So a one-node model is loaded.
    """
    if CUDA not in ort.get_available_providers() or find_gpu() is None:
        return False
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ort.preload_dlls()  # from the nvidia-* packages, which the loader does not search
    if printed.getvalue():
        logger.info("onnxruntime: %s", printed.getvalue().strip())
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(_ONE_NODE, options, providers=[CUDA, CPU])
    except _error_types(ort):
        return False
    return bool(session.get_providers()[0] == CUDA)


def _check_types(stage: str, declared: StageIO) -> None:
    for name, spec in {**declared.inputs, **declared.outputs}.items():
        if spec.dtype not in _ONNX_TYPES:
            raise EngineError(
                f"{stage}: {name} is {spec.dtype}, which the onnxruntime backend cannot hold "
                f"({', '.join(_ONNX_TYPES)}); export with --fp16 or --fp32"
            )


def _error_types(ort: Any) -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises: its own classes (no common base) and pybind11's."""
    native = vars(ort.capi.onnxruntime_pybind11_state).values()
    own = [kind for kind in native if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()


def _failure(stage: str, error: Exception) -> str:
    """Return one line about a failed run."""
    if lacks_memory(error):
        return f"out of memory in stage {stage}; use a smaller --batch-size"
    return f"stage {stage} failed: {_first_line(error)}"
