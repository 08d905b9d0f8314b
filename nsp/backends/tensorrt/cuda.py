"""GPU memory, streams and graphs through NVIDIA's bindings of the CUDA runtime, without torch.

Every array is a view (address, shape, dtype) of memory that returns to its pool when its last view
is deleted. All work of a `Stream` runs in order, so memory may be used again at once.
"""

import contextlib
import gc
import importlib
import math
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nsp.errors import BackendError
from nsp.stage.io import Shape, array_bytes

ALIGNMENT = 256  # bytes; TensorRT requires this of every address
_MIB = 2**20


def import_cuda() -> Any:
    """Return the bindings of the CUDA runtime; raise BackendError without them."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError(
            f"the Python bindings of CUDA cannot be loaded ({error}); "
            "run: pip install 'cuda-bindings>=13,<14'"
        ) from error


def aligned(num_bytes: int) -> int:
    """Return the bytes rounded up to the next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A packed array in GPU memory. Slices of the first axis and other shapes are views."""

    address: int
    shape: Shape
    dtype: str
    memory: object  # keeps the address valid

    @property
    def num_bytes(self) -> int:
        """Its size in bytes."""
        return array_bytes(self.shape, self.dtype)

    def __getitem__(self, key: slice) -> Self:
        start, stop, step = key.indices(self.shape[0])
        assert step == 1, "only a contiguous part is a view"
        row = array_bytes(self.shape[1:], self.dtype)
        shape = (max(stop - start, 0), *self.shape[1:])
        return type(self)(self.address + start * row, shape, self.dtype, self.memory)

    def reshape(self, shape: Shape) -> Self:
        """Return a view of another shape."""
        assert math.prod(shape) == math.prod(self.shape), (self.shape, shape)
        return type(self)(self.address, tuple(shape), self.dtype, self.memory)


class Unused:
    """The unused memory of a stream, in lists by size."""

    def __init__(self, runtime: Any) -> None:
        self._runtime, self._is_closed = runtime, False
        self.addresses: defaultdict[int, list[int]] = defaultdict(list)

    def take_back(self, address: int, num_bytes: int) -> None:
        """Keep a piece for the next request."""
        if self._is_closed:
            self._runtime.cudaFree(address)
        else:
            self.addresses[num_bytes].append(address)

    def close(self, stream: int) -> None:
        """Free all of it now, and later pieces at once; also destroy the stream."""
        self._is_closed = True
        for addresses in self.addresses.values():
            while addresses:
                self._runtime.cudaFree(addresses.pop())
        self._runtime.cudaStreamDestroy(stream)


class Memory:
    """A piece of GPU memory; it returns to the unused ones when nothing needs it."""

    def __init__(self, address: int, num_bytes: int, unused: Unused, owner: object) -> None:
        self.address, self.num_bytes = address, num_bytes
        self._unused, self._owner = unused, owner

    def __del__(self) -> None:
        self._unused.take_back(self.address, self.num_bytes)


class Graph:
    """Recorded work, launched as one."""

    def __init__(self, runtime: Any, executable: Any) -> None:
        self.executable = executable
        weakref.finalize(self, runtime.cudaGraphExecDestroy, executable).atexit = False


class Stream:
    """A queue of work on the GPU, done in order, and the memory it uses.

    Unused memory is kept by size: the next call needs the same sizes, so it allocates
    nothing.
    """

    def __init__(self, runtime: Any, label: str) -> None:
        """`label` begins every error. Raises BackendError when the GPU cannot be used."""
        self._runtime, self.label = runtime, label
        self.handle = int(self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)[0])
        self._unused = Unused(runtime)
        # Usually all memory has been returned by then, because it refers to the stream. But if both
        # are in one cycle of references, the stream is finalized first and the memory later.
        weakref.finalize(self, self._unused.close, self.handle).atexit = False

    def free_memory(self) -> tuple[int, int]:
        """Return the GPU's free bytes and its total bytes."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def memory(self, num_bytes: int) -> Memory:
        """Return uninitialised memory.

        Raises BackendError saying how much is missing when there is not enough.
        """
        num_bytes = aligned(max(num_bytes, 1))
        addresses = self._unused.addresses[num_bytes]
        address = addresses.pop() if addresses else self._new(num_bytes)
        return Memory(address, num_bytes, self._unused, self)

    def _new(self, num_bytes: int) -> int:
        out_of_memory = self._runtime.cudaError_t.cudaErrorMemoryAllocation
        error, address = self._runtime.cudaMalloc(num_bytes)
        if error == out_of_memory:
            self._runtime.cudaGetLastError()
            self.trim()
            error, address = self._runtime.cudaMalloc(num_bytes)
        if error == out_of_memory:
            self._runtime.cudaGetLastError()
            free, total = self.free_memory()
            raise BackendError(
                f"{self.label}: out of GPU memory: {mib(num_bytes)} are needed in one piece, but "
                f"{mib(free)} of {mib(total)} are free ({mib(max(num_bytes - free, 0))} too few); "
                "use a smaller --batch-size, or end other programs on the GPU"
            )
        self._check("cudaMalloc", error)
        return int(address)

    def trim(self) -> None:
        """Free the unused memory."""
        for addresses in self._unused.addresses.values():
            while addresses:
                self._call("cudaFree", addresses.pop())

    def allocate(self, shape: Shape, dtype: str) -> DeviceArray:
        """Return an uninitialised array."""
        memory = self.memory(array_bytes(shape, dtype))
        return DeviceArray(memory.address, tuple(shape), dtype, memory)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """Return a copy of `array` on the GPU."""
        packed = np.asarray(array, order="C")
        result = self.allocate(packed.shape, packed.dtype.name)
        self.send(result.address, packed.ctypes.data, packed.nbytes)
        self.synchronize()  # until then the copy may still read `packed`
        return result

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Return a copy in host memory; bfloat16 becomes float32."""
        stored = "uint16" if array.dtype == "bfloat16" else array.dtype
        result = np.empty(array.shape, stored)
        if result.nbytes:
            kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self._copy(result.ctypes.data, array.address, result.nbytes, kind)
        self.synchronize()
        if array.dtype == "bfloat16":  # the upper half of a float32
            return (result.astype(np.uint32) << 16).view(np.float32)
        return result

    def copy(self, array: DeviceArray) -> DeviceArray:
        """Return a copy on the GPU."""
        result = self.allocate(array.shape, array.dtype)
        self.move(result.address, array.address, array.num_bytes)
        return result

    def move(self, target: int, source: int, num_bytes: int) -> None:
        """Copy bytes on the GPU."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._copy(target, source, num_bytes, kind)

    def move_rows(
        self, target: int, source: int, *, row_bytes: int, pitches: tuple[int, int], rows: int
    ) -> None:
        """Copy the first bytes of rows on the GPU; `pitches`: row strides of both in bytes."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        there, here = pitches
        self._call(
            *("cudaMemcpy2DAsync", target, there, source, here, row_bytes, rows, kind),
            self.handle,
        )

    def fill_with_zeros(self, target: int, num_bytes: int) -> None:
        """Fill memory on the GPU with zeros."""
        self._call("cudaMemsetAsync", target, 0, num_bytes, self.handle)

    def send(self, target: int, source: int, num_bytes: int) -> None:
        """Copy bytes from host memory, which must not change until the stream is done."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(target, source, num_bytes, kind)

    def _copy(self, target: int, source: int, num_bytes: int, kind: Any) -> None:
        if num_bytes:
            self._call("cudaMemcpyAsync", target, source, num_bytes, kind, self.handle)

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return page-locked host memory, which is transferred without an extra copy."""
        import ctypes

        flags = self._runtime.cudaHostAllocDefault
        address = int(self._call("cudaHostAlloc", max(num_bytes, 1), flags)[0])
        buffer = (ctypes.c_uint8 * max(num_bytes, 1)).from_address(address)
        weakref.finalize(buffer, self._runtime.cudaFreeHost, address).atexit = False
        return np.ctypeslib.as_array(buffer)

    def synchronize(self) -> None:
        """Wait until all work is done; raise BackendError when some of it failed."""
        self._call("cudaStreamSynchronize", self.handle)

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[Graph]]:
        """Record the block's work without doing it; afterwards the list has its Graph."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        captured: list[Graph] = []
        with _no_collection():
            self._call("cudaStreamBeginCapture", self.handle, mode)
            try:
                yield captured
            except BaseException:
                # Ends the broken capture; the original error is being raised.
                error, graph = self._runtime.cudaStreamEndCapture(self.handle)
                if error == self._runtime.cudaError_t.cudaSuccess and graph is not None:
                    self._call("cudaGraphDestroy", graph)
                self._runtime.cudaGetLastError()
                raise
            (graph,) = self._call("cudaStreamEndCapture", self.handle)
        try:
            (executable,) = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        captured.append(Graph(self._runtime, executable))

    def launch(self, graph: Graph) -> None:
        """Do recorded work."""
        self._call("cudaGraphLaunch", graph.executable, self.handle)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Return the result of a runtime function; raise BackendError when it fails."""
        error, *values = getattr(self._runtime, name)(*arguments)
        self._check(name, error)
        return tuple(values)

    def _check(self, name: str, error: Any) -> None:
        if error == self._runtime.cudaError_t.cudaSuccess:
            return
        self._runtime.cudaGetLastError()  # clears it, otherwise TensorRT reports it as its own
        _, text = self._runtime.cudaGetErrorString(error)
        code = getattr(error, "name", str(error))
        words = text.decode() if isinstance(text, bytes) else "unknown"
        raise BackendError(f"{self.label}: {words} ({code}, in {name}); nsp doctor shows the GPU")


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage before the block, not in it: freeing GPU memory would break the capture."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def mib(num_bytes: int) -> str:
    """Return bytes in words."""
    return f"{num_bytes / _MIB:,.0f} MiB"
