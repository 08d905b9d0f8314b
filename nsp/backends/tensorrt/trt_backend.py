"""The backends `tensorrt` and `tensorrt_rtx`: engines on an NVIDIA GPU, with the same code.

Every stage is one engine with one profile per scale; an execution context keeps its profile and
shapes, because switching doubles latency and breaks captured graphs. All contexts share one scratch
block, as a stream runs them in turn. Keys and values are written into the arena, where the next
step reads them. The whole loop becomes one CUDA graph (replay.py). Nothing here imports torch.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from numpy.typing import NDArray

from nsp import cores
from nsp.backends.tensorrt.cuda import (
    ALIGNMENT,
    DeviceArray,
    Memory,
    Stream,
    import_cuda,
    mib,
)
from nsp.backends.tensorrt.replay import Recorder, Runner
from nsp.backends.tensorrt.trt_engine import Context, Engine, Runtime
from nsp.errors import BackendError, FeedError
from nsp.stage.backend import TENSORRT_RANKS, Loop, T
from nsp.stage.io import Shape, StageIO

logger = logging.getLogger(__name__)

Allocate: TypeAlias = Callable[[Shape, str], DeviceArray]

_CACHE_FOLDER = "nsp/tensorrt_rtx"  # in the cache folder of the user


class StageRunner(Runner):
    """Stages in execution contexts of their own, with outputs from one allocator."""

    name: ClassVar[str] = "tensorrt"
    max_ranks = TENSORRT_RANKS

    def __init__(
        self,
        engines: Mapping[str, Engine],
        stream: Stream,
        *,
        kv_layout: str,
        scratch: Memory | None,
        allocate: Allocate,
    ) -> None:
        """Without `scratch` nothing is enqueued: only shapes and memory are computed."""
        super().__init__({stage: engine.declared for stage, engine in engines.items()})
        self.kv_layout, self.stream = kv_layout, stream
        self._engines, self._scratch, self._allocate = engines, scratch, allocate
        self._contexts: dict[Any, Context] = {}

    def run(
        self, stage: str, feeds: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return all outputs, enqueued: each in the array given for it or in a new one."""
        engine = self._engines[stage]
        shapes, profile = engine.plan(feeds)
        results = self._result_arrays(engine, shapes, outputs or {})
        moves: list[tuple[DeviceArray, DeviceArray]] = []  # to, from; after the stage
        addresses = {}
        for name in engine.inputs:
            array = feeds[name]
            if array.address % ALIGNMENT:
                array = self.allocate(array.shape, array.dtype)
                self._move(array, feeds[name])
            addresses[name] = array.address
        for name, array in results.items():
            if array.address % ALIGNMENT:
                moves.append((array, array := self.allocate(array.shape, array.dtype)))
            addresses[name] = array.address
        if self._scratch is not None:
            self._context(engine, profile, feeds, self._scratch).run(addresses)
        for target, source in moves:
            self._move(target, source)
        return results

    def _result_arrays(
        self, engine: Engine, shapes: Mapping[str, Shape], given: Mapping[str, DeviceArray]
    ) -> dict[str, DeviceArray]:
        if unknown := given.keys() - shapes.keys():
            raise FeedError(
                f"{engine.stage}: unknown output {min(unknown)!r}; known: {', '.join(shapes)}"
            )
        results = {}
        for name, shape in shapes.items():
            dtype = engine.declared.outputs[name].dtype
            array = given.get(name) or self.allocate(shape, dtype)
            if (array.shape, array.dtype) != (shape, dtype):
                raise FeedError(
                    f"{engine.stage}: the array for {name} is {array.dtype} {array.shape}; "
                    f"expected {dtype} {shape}"
                )
            results[name] = array
        return results

    def _context(
        self, engine: Engine, profile: int, feeds: Mapping[str, DeviceArray], scratch: Memory
    ) -> Context:
        """Return the context for these shapes; captured graphs need contexts of their own."""
        shapes = {name: feeds[name].shape for name in engine.inputs}
        key = (engine.stage, *shapes.values())
        if key not in self._contexts:
            self._contexts[key] = Context(engine, profile, shapes, scratch)
        return self._contexts[key]

    def _move(self, target: DeviceArray, source: DeviceArray) -> None:
        if self._scratch is not None:
            self.stream.move(target.address, source.address, source.num_bytes)

    def why_not_captured(self) -> str:
        """Return a text about a stage that cannot be in a CUDA graph, or an empty text."""
        for (stage, *_), context in self._contexts.items():
            if not context.is_capturable():
                return f"the engine of stage {stage} was built without REQUIRE_USER_ALLOCATION"
        return ""

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """Return a copy in GPU memory."""
        return self.stream.upload(array)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy in host memory, once all work is done; bfloat16 becomes float32."""
        return self.stream.download(array)

    def allocate(self, shape: Shape, dtype: str) -> DeviceArray:
        """Return uninitialised GPU memory; raise BackendError when there is not enough."""
        return self._allocate(shape, dtype)

    def copy_rows(self, source: Any, target: Any) -> None:
        """Fill `target` (P, N, ...) with the first N of `source` (P, G, ...)."""
        if self._scratch is not None and target.num_bytes:
            there, here = (each.num_bytes // each.shape[0] for each in (target, source))
            self.stream.move_rows(
                target.address,
                source.address,
                row_bytes=there,
                pitches=(there, here),
                rows=target.shape[0],
            )

    def fill_with_zeros(self, array: Any) -> None:
        """Fill an array with zeros."""
        if self._scratch is not None:
            self.stream.fill_with_zeros(array.address, array.num_bytes)


class TensorRTBackend(StageRunner):
    """Engines of TensorRT; loops are recorded as CUDA graphs and replayed."""

    name: ClassVar[str] = "tensorrt"
    records: ClassVar[bool] = True

    def __init__(
        self,
        stage_files: Mapping[str, Path],
        stages_io: Mapping[str, StageIO],
        *,
        kv_layout: str,
        cache_file: Path | None = None,
    ) -> None:
        """Load the plans of all stages; `cache_file` keeps kernels that TensorRT for RTX compiles.

        Raises BackendError without TensorRT, the CUDA bindings, a GPU or enough memory on it,
        EngineError for a plan that is damaged, for another machine or of another stage.
        """
        stream = Stream(import_cuda(), self.name)
        self._runtime = Runtime(self.name, stream, cache_file)
        _check_room(stage_files, stream)
        engines = {
            stage: Engine(stage, path, stages_io[stage], self._runtime)
            for stage, path in stage_files.items()
        }
        # One block for all contexts of this pipeline: its stream runs one of them at a time.
        scratch = stream.memory(max(engine.scratch_bytes for engine in engines.values()))
        free, total = stream.free_memory()
        logger.info(
            "%s: engines loaded, scratch %s; %s of %s GPU memory are free",
            *(self.name, mib(scratch.num_bytes), mib(free), mib(total)),
        )
        new_runner = partial(StageRunner, engines, stream, kv_layout=kv_layout)
        super().__init__(
            engines, stream, kv_layout=kv_layout, scratch=scratch, allocate=stream.allocate
        )
        self.batch_sizes = _batch_sizes(engines.values())
        # A captured graph keeps pointing into its contexts, so every recording has its own
        # (contexts share profiles since TensorRT 10).
        self._recorder = Recorder(
            stream,
            run_in=lambda space: new_runner(scratch=scratch, allocate=space.allocate),
            measure_in=lambda space: new_runner(scratch=None, allocate=space.allocate),
        )

    def play(self, name: str, inputs: Mapping[str, NDArray[Any]], loop: Loop[T]) -> Iterator[T]:
        """Yield the results of `loop`: first run, then captured, then replayed as graphs."""
        yield from self._recorder.play(name, inputs, loop)
        self._runtime.save_cache()


class TensorRTRTXBackend(TensorRTBackend):
    """Engines of TensorRT for RTX."""

    name: ClassVar[str] = "tensorrt_rtx"


def _batch_sizes(engines: Iterable[Engine]) -> tuple[int, ...]:
    """Return the numbers of images that batches are padded to, so that recordings stay few.

    They are the powers of two that all engines accept, and the largest number that they accept. If
    engines were built only for full batches, that is the only one.
    """
    spans = [span for engine in engines if (span := engine.span("B")) is not None]
    if not spans:
        return ()
    low, high = max(low for low, _ in spans), min(high for _, high in spans)
    powers = (1 << power for power in range(high.bit_length()))
    return (*(size for size in powers if low <= size < high), high)


def _check_room(stage_files: Mapping[str, Path], stream: Stream) -> None:
    """Raise BackendError when the plans are larger than the GPU's free memory."""
    try:
        weights = sum(path.stat().st_size for path in stage_files.values())
    except OSError:
        return  # opening a missing engine reports it
    free, total = stream.free_memory()
    if weights > free:
        raise BackendError(
            f"{stream.label}: the engines need {mib(weights)}, but {mib(free)} of {mib(total)} GPU "
            f"memory are free ({mib(weights - free)} too few); end other programs on the GPU, or "
            "export a smaller precision (--fp16)"
        )


def load_engines(
    backend: type[TensorRTBackend],
    stage_files: Mapping[str, Path],
    stages_io: Mapping[str, StageIO],
    *,
    kv_layout: str,
    device: str,
    num_threads: int | None = None,
) -> TensorRTBackend:
    """Return the backend of an engine folder's stages."""
    assert device == "cuda", device
    if num_threads is not None:
        logger.warning("num_threads=%d has no effect on a GPU", cores.num_threads(num_threads))
    kernels = kernel_cache(stage_files)
    return backend(stage_files, stages_io, kv_layout=kv_layout, cache_file=kernels)


def kernel_cache(stage_files: Mapping[str, Path]) -> Path | None:
    """Return the file for kernels compiled for these engines, in the user's cache folder.

    Compiled code is never read from an engine folder, which may come from somebody else. Folders of
    engines are named by their content, so these names identify the kernels. None if the user has no
    home folder.
    """
    names = json.dumps(sorted((stage, path.parent.name) for stage, path in stage_files.items()))
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return root / _CACHE_FOLDER / f"{digest}.cache"


load_tensorrt = partial(load_engines, TensorRTBackend)
load_tensorrt_rtx = partial(load_engines, TensorRTRTXBackend)


@cache
def why_not_here(module: str) -> str:
    """Return why `module` cannot run engines on this machine, or an empty text."""
    try:
        Runtime(module, Stream(import_cuda(), module))
    except BackendError as error:
        return str(error)
    return ""
