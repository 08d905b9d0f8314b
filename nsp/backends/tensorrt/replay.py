"""Loops over stages recorded as CUDA graphs and replayed.

The first call of a loop runs stage by stage, and TensorRT completes its delayed initialization. The
second call is captured, with one graph for every result that the loop yields. From then on the
graphs are launched, and no Python code of the loop or of a stage runs. All inputs of a loop are in
one piece of memory and are copied at once. Loops use their workspaces in turn; results are copied
out, so that they do not change later.

A recording belongs to one loop and to inputs of the same names, shapes and dtypes. To keep
recordings few, batches are padded to the backend's `batch_sizes`, a batch of B images has B encoded
prompts, or 2B if one has a null prompt, and the ranks R are rounded up to buckets. So each loop of
a model ("picture", "steps", "traced") has at most

    batch sizes x 2 numbers of prompts x batch keys (guided or not, ...) x buckets of ranks

recordings; the family decides the keys and buckets, and most users need one of each.
"""

import dataclasses
import itertools
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from nsp.backends.tensorrt.cuda import DeviceArray, Graph, Memory, Stream, aligned, mib
from nsp.errors import BackendError
from nsp.stage.backend import Backend, Loop
from nsp.stage.io import Shape, array_bytes

logger = logging.getLogger(__name__)

T = TypeVar("T")
Host: TypeAlias = Mapping[str, NDArray[Any]]

# With more, the least recently used is deleted. It is enough for two loops, batches up to 8 (4
# sizes), both numbers of prompts, guided or not. Each has execution contexts, so there is a limit.
_MAX_RECORDINGS = 32


class Runner(Backend):
    """A backend that runs the stages of a loop in a workspace."""

    @abstractmethod
    def why_not_captured(self) -> str:
        """Return why the last run cannot be captured, or an empty text."""


class Workspace:
    """Memory that is allocated in order, at the same addresses after every `reset`."""

    def __init__(self, memory: Memory | None = None) -> None:
        """Without memory it only counts bytes."""
        self.memory, self.used, self.is_busy = memory, 0, False

    @property
    def num_bytes(self) -> int:
        """Its size in bytes."""
        return 0 if self.memory is None else self.memory.num_bytes

    def reset(self) -> None:
        """Start again."""
        self.used = 0

    def allocate(self, shape: Shape, dtype: str) -> DeviceArray:
        """Return the next array."""
        address = self.used + (0 if self.memory is None else self.memory.address)
        self.used += aligned(array_bytes(shape, dtype))
        assert self.memory is None or self.used <= self.num_bytes, "measured before"
        return DeviceArray(address, tuple(shape), dtype, self.memory)


def place_inputs(inputs: Host, workspace: Workspace) -> dict[str, DeviceArray]:
    """Return the arrays for the inputs, at the beginning of the workspace."""
    workspace.reset()
    return {n: workspace.allocate(a.shape, a.dtype.name) for n, a in inputs.items()}


class _Staging:
    """Page-locked host memory with the same layout as the inputs on the GPU."""

    def __init__(self, stream: Stream, arrays: Mapping[str, DeviceArray]) -> None:
        self._stream = stream
        self._target = min(array.address for array in arrays.values())
        end = max(array.address + array.num_bytes for array in arrays.values())
        self._buffer = stream.pinned(end - self._target)
        self._views: dict[str, NDArray[Any]] = {}
        for name, array in arrays.items():
            start = array.address - self._target
            part = self._buffer[start : start + array.num_bytes]
            self._views[name] = part.view(array.dtype).reshape(array.shape)
        self._last: dict[str, NDArray[Any]] = {}

    def send(self, inputs: Host) -> None:
        """Copy the inputs to the GPU in one piece."""
        self._stream.synchronize()  # an earlier copy may still read the buffer
        for name, array in inputs.items():
            # Read-only arrays, such as resizing matrices, are the same in every call.
            if array is not self._last.get(name) or array.flags.writeable:
                np.copyto(self._views[name], array)
        self._last = dict(inputs)
        self._stream.send(self._target, self._buffer.ctypes.data, self._buffer.nbytes)


class Recording:
    """One loop with inputs of one kind: run first, then captured, then replayed."""

    def __init__(
        self, key: Any, inputs: Host, runner: Runner, stream: Stream, workspace: Workspace
    ) -> None:
        self.key, self.workspace = key, workspace
        self._runner, self._stream = runner, stream
        self._staging = _Staging(stream, place_inputs(inputs, workspace))
        self._has_run, self._can_capture = False, True
        self._graphs: list[tuple[Graph, Any]] | None = None

    def play(self, inputs: Host, loop: Loop[T]) -> Iterator[T]:
        """Yield the results of the loop, copied out of the workspace."""
        self._staging.send(inputs)
        if self._graphs is not None:
            for graph, result in self._graphs:
                self._stream.launch(graph)
                yield copied(result, self._stream)
        elif self._has_run and self._can_capture:
            yield from self._capture(inputs, loop)
        else:
            yield from self._run(inputs, loop)

    def _begin(self, inputs: Host, loop: Loop[T]) -> Iterator[T]:
        """Return the loop; its memory has the same addresses as the last time."""
        return loop(self._runner, place_inputs(inputs, self.workspace))

    def _run(self, inputs: Host, loop: Loop[T]) -> Iterator[T]:
        for result in self._begin(inputs, loop):
            yield copied(result, self._stream)
        is_first, self._has_run = not self._has_run, True
        if is_first and (reason := self._runner.why_not_captured()):
            self._refuse(reason)

    def _capture(self, inputs: Host, loop: Loop[T]) -> Iterator[T]:
        """Yield the results while recording the work for each of them."""
        graphs: list[tuple[Graph, Any]] = []
        steps, end = self._begin(inputs, loop), object()
        while True:
            try:
                with self._stream.capture() as captured:
                    result: Any = next(steps, end)
            except BackendError as error:
                self._refuse(str(error))
                rest = itertools.islice(self._run(inputs, loop), len(graphs), None)
                yield from rest  # the inputs are still there, so the results can be computed again
                return
            if result is end:
                break
            graphs.append((captured[0], result))
            self._stream.launch(captured[0])
            yield copied(result, self._stream)
        self._graphs = graphs

    def _refuse(self, reason: str) -> None:
        self._can_capture = False
        logger.warning("%s runs stage by stage, not as a CUDA graph: %s", self.key[0], reason)


class Recorder:
    """The recordings of one backend, and the workspaces that they use in turn."""

    def __init__(
        self,
        stream: Stream,
        *,
        run_in: Callable[[Workspace], Runner],
        measure_in: Callable[[Workspace], Runner],
    ) -> None:
        """Two ways to create a runner of stages in a workspace; the second runs no stage."""
        self._stream, self._run_in, self._measure_in = stream, run_in, measure_in
        self._recordings: list[Recording] = []  # the one used last is last

    def play(self, name: str, inputs: Host, loop: Loop[T]) -> Iterator[T]:
        """Yield the results of the loop called `name`.

        Raises BackendError when the GPU does not have enough memory.
        """
        key = (name, *((n, a.shape, a.dtype.str) for n, a in inputs.items()))
        recording = self._find(key) or self._new(key, inputs, loop)
        recording.workspace.is_busy = True
        try:
            yield from recording.play(inputs, loop)
        finally:
            recording.workspace.is_busy = False

    def _find(self, key: Any) -> Recording | None:
        """Return the recording for the key that no unfinished loop is using."""
        for recording in self._recordings:
            if recording.key == key and not recording.workspace.is_busy:
                self._recordings.remove(recording)
                self._recordings.append(recording)
                return recording
        return None

    def _new(self, key: Any, inputs: Host, loop: Loop[T]) -> Recording:
        workspace = self._workspace(self._measure(inputs, loop))
        recording = Recording(key, inputs, self._run_in(workspace), self._stream, workspace)
        idle = [each for each in self._recordings if not each.workspace.is_busy]
        if len(self._recordings) >= _MAX_RECORDINGS and idle:
            self._recordings.remove(idle[0])
        self._recordings.append(recording)
        return recording

    def _measure(self, inputs: Host, loop: Loop[T]) -> int:
        """Return the bytes that a loop needs, by following it without running a stage."""
        counted = Workspace()
        for _ in loop(self._measure_in(counted), place_inputs(inputs, counted)):
            pass
        return counted.used

    def _workspace(self, num_bytes: int) -> Workspace:
        """Return an idle workspace of that size; smaller idle ones are freed for a new one."""
        spaces = (each.workspace for each in self._recordings if not each.workspace.is_busy)
        if found := next((space for space in spaces if space.num_bytes >= num_bytes), None):
            return found
        self._recordings = [each for each in self._recordings if each.workspace.is_busy]
        self._stream.trim()
        logger.info("%s: workspace of %s", self._stream.label, mib(num_bytes))
        return Workspace(self._stream.memory(num_bytes))


def copied(result: T, stream: Stream) -> T:
    """Return a result with its arrays copied: an array, a tuple, a mapping or a dataclass."""
    found: Any = result
    if isinstance(found, DeviceArray):
        found = stream.copy(found)
    elif isinstance(found, Mapping):
        found = {name: copied(each, stream) for name, each in found.items()}
    elif isinstance(found, tuple):
        found = tuple(copied(each, stream) for each in found)
    elif dataclasses.is_dataclass(found) and not isinstance(found, type):
        fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
        found = dataclasses.replace(found, **{n: copied(a, stream) for n, a in fields.items()})
    return found  # type: ignore[no-any-return]
