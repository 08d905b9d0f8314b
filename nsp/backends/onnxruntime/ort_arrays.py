"""The memory of the `onnxruntime` backend's arrays: NumPy arrays on the host, or device memory.

A device array is a part of a block that ONNX Runtime allocated: views are computed offsets, and a
stage's inputs and outputs are bound by address, so the KV cache never leaves the device and nothing
is copied between stages.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from nsp.errors import BackendError
from nsp.stage.arena import HostArrays
from nsp.stage.io import Shape


class DeviceArray:
    """A contiguous array in a block of device memory; the block lives as long as any view of it."""

    def __init__(self, block: Any, offset: int, shape: Shape, dtype: np.dtype[Any]) -> None:
        self._block, self._offset = block, offset  # an OrtValue, bytes
        self.shape, self.dtype = shape, dtype

    @property
    def address(self) -> int:
        """Its address, inside its block even when it is empty, so never 0."""
        return int(self._block.data_ptr()) + self._offset

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, key: slice) -> Self:
        """Return a view of consecutive items of the first axis."""
        start, stop, step = key.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"device arrays have no views with a step, got {key}")
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (max(0, stop - start), *self.shape[1:])
        return type(self)(self._block, self._offset + start * row, shape, self.dtype)

    def reshape(self, shape: Sequence[int]) -> Self:
        """Return a view of another shape of the same size."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"an array of shape {self.shape} cannot be viewed as {tuple(shape)}")
        return type(self)(self._block, self._offset, tuple(shape), self.dtype)

    def fill(self, values: NDArray[Any]) -> None:
        """Copy values of this shape into it; the whole block crosses the bus twice."""
        host = self._block.numpy()
        part = host.reshape(-1).view(np.uint8)[self._offset : self._offset + self.nbytes]
        part[...] = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8)
        self._block.update_inplace(host)

    def to_host(self) -> NDArray[Any]:
        """Return a NumPy copy; the whole block of a view crosses the bus."""
        host = self._block.numpy().reshape(-1).view(np.uint8)
        part = host[self._offset : self._offset + self.nbytes].view(self.dtype)
        return np.array(part.reshape(self.shape))


class Memory(Protocol):
    """The operations that the backend needs of a kind of memory; each kind has its own arrays."""

    def allocate(self, shape: Shape, dtype: str) -> Any:
        """Return an uninitialised array; raise BackendError when there is not enough memory."""

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a NumPy array's content as an array of this kind."""

    def download(self, array: Any) -> NDArray[Any]:
        """Return a NumPy copy."""

    def copy_rows(self, source: Any, target: Any) -> None:
        """Fill `target` (P, N, ...) with the first N of `source` (P, G, ...)."""

    def is_contiguous(self, array: Any) -> bool:
        """Return whether results can be written into an array."""

    def bind(
        self, binding: Any, inputs: Sequence[str], feeds: Any, results: dict[str, Any]
    ) -> None:
        """Tell ONNX Runtime the addresses of a stage's inputs and outputs."""


class HostMemory(HostArrays):
    """NumPy arrays: inputs are read and outputs written in place."""

    def __init__(self, ort: Any) -> None:
        self._ort_value = ort.OrtValue.ortvalue_from_numpy  # shares the array's memory

    def allocate(self, shape: Shape, dtype: str) -> NDArray[Any]:
        """Return host memory."""
        try:
            return super().allocate(shape, dtype)
        except MemoryError as error:
            raise out_of_memory(error) from error

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return `array`, contiguous; it is not copied when it already is."""
        return np.asarray(array, order="C")

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a copy."""
        return np.array(array)

    def is_contiguous(self, array: NDArray[Any]) -> bool:
        """Return whether it is one block in C order."""
        return array.flags.c_contiguous

    def bind(
        self, binding: Any, inputs: Sequence[str], feeds: Any, results: dict[str, Any]
    ) -> None:
        """Bind the arrays' own memory."""
        for name in inputs:
            binding.bind_cpu_input(name, feeds[name])
        for name, array in results.items():
            binding.bind_ortvalue_output(name, self._ort_value(array))


class DeviceMemory:
    """Blocks that ONNX Runtime allocates on a device ("cuda"; "cpu" stands in for one in tests)."""

    def __init__(self, ort: Any, device: str, errors: tuple[type[Exception], ...]) -> None:
        self._ort, self._device = ort, device
        self._errors: tuple[type[Exception], ...] = (*errors, MemoryError)

    def allocate(self, shape: Shape, dtype: str) -> DeviceArray:
        """Return device memory, also for an empty array, whose address must not be 0."""
        kind = np.dtype(dtype)
        count = max(1, math.prod(shape))
        try:
            block = self._ort.OrtValue.ortvalue_from_shape_and_type(
                [count], kind.type, self._device, 0
            )
        except self._errors as error:
            raise out_of_memory(error) from error
        return DeviceArray(block, 0, tuple(shape), kind)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """Return a copy on the device."""
        if array.size == 0:
            return self.allocate(array.shape, array.dtype.name)
        flat = np.array(array, order="C").reshape(-1)  # a copy, since "cpu" would share the memory
        try:
            block = self._ort.OrtValue.ortvalue_from_numpy(flat, self._device, 0)
        except self._errors as error:
            raise out_of_memory(error) from error
        return DeviceArray(block, 0, array.shape, array.dtype)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Return a copy in host memory; no wait is needed, since a stage has ended after `run`."""
        return array.to_host()

    def copy_rows(self, source: DeviceArray, target: DeviceArray) -> None:
        """Fill `target` (P, N, ...) through the host; only a layout not used here needs this."""
        target.fill(source.to_host()[:, : target.shape[1]])

    def is_contiguous(self, array: DeviceArray) -> bool:
        """Return True: all device arrays are contiguous."""
        return True

    def bind(
        self, binding: Any, inputs: Sequence[str], feeds: Any, results: dict[str, Any]
    ) -> None:
        """Bind addresses; the caller's references keep the blocks alive."""
        for name in inputs:
            binding.bind_input(name, self._device, 0, *_place(feeds[name]))
        for name, array in results.items():
            binding.bind_output(name, self._device, 0, *_place(array))


def _place(array: DeviceArray) -> tuple[Any, list[int], int]:
    """Return element type, shape and address."""
    return array.dtype.type, list(array.shape), array.address


def out_of_memory(error: Exception) -> BackendError:
    """Return the error for an array that could not be allocated."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].strip()
    return BackendError(f"onnxruntime: out of memory ({reason}); use a smaller --batch-size")
