"""A stand-in for the CUDA runtime and for TensorRT that computes what they would.

"Device" memory is host memory filled with 0xff, every address is checked, a captured graph is a
list of calls, and an engine is a plan in JSON whose stage is run by its PyTorch module on the
memory at the addresses bound. Every name here must exist in the real modules: tests check that, so
code that runs on the stand-in calls nothing the real ones lack.
"""

import ctypes
import enum
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from nsp.stage.io import StageIO, array_bytes


class cudaError_t(enum.IntEnum):  # as it is called there
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess


class CudaStandIn:
    """The functions of cuda.bindings.runtime that are used; `calls` are their names in order."""

    cudaError_t, cudaMemcpyKind = cudaError_t, cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking, cudaHostAllocDefault = 1, 0

    def __init__(self, total: int = 1 << 30) -> None:
        self._total, self._held = total, 0
        self._blocks: dict[int, Any] = {}  # device address -> (buffer, bytes)
        self._host: dict[int, Any] = {}
        self._captures: dict[int, list[Callable[[], None]]] = {}
        self._streams: set[int] = set()
        self._next = 10
        self._failures: dict[str, cudaError_t] = {}
        self._last_error: cudaError_t = OK
        self.calls: list[str] = []

    def _enter(self, name: str) -> cudaError_t | None:
        self.calls.append(name)
        failed = self._failures.get(name)
        self._last_error = failed or self._last_error
        return failed

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _enqueue(self, stream: int, work: Callable[[], None]) -> None:
        assert stream in self._streams, "the default stream, or none"
        if stream in self._captures:
            self._captures[stream].append(work)
        else:
            work()

    def _check_device(self, address: int, num_bytes: int) -> None:
        for start, (_, size) in self._blocks.items():
            if start <= address and address + num_bytes <= start + size:
                return
        raise AssertionError(f"{num_bytes} bytes at {address} are no device memory")

    def cudaMalloc(self, size):
        failed = self._enter("cudaMalloc")
        assert not self._captures, "cudaMalloc while capturing"
        if failed or self._held + size > self._total:
            self._last_error = failed or cudaError_t.cudaErrorMemoryAllocation
            return self._last_error, None
        buffer = np.full(size + 256, 0xFF, np.uint8)
        address = -(-buffer.ctypes.data // 256) * 256
        self._blocks[address] = (buffer, size)
        self._held += size
        return OK, address

    def cudaFree(self, address):
        self._enter("cudaFree")
        self._held -= self._blocks.pop(address)[1]
        return (OK,)

    def cudaMemGetInfo(self):
        self._enter("cudaMemGetInfo")
        return OK, self._total - self._held, self._total

    def cudaHostAlloc(self, size, flags):
        self._enter("cudaHostAlloc")
        buffer = np.zeros(size, np.uint8)
        self._host[buffer.ctypes.data] = buffer
        return OK, buffer.ctypes.data

    def cudaFreeHost(self, address):
        self._enter("cudaFreeHost")
        del self._host[address]
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags):
        if failed := self._enter("cudaStreamCreateWithFlags"):
            return failed, None
        assert flags == self.cudaStreamNonBlocking
        stream = self._number()
        self._streams.add(stream)
        return OK, stream

    def cudaStreamDestroy(self, stream):
        self._enter("cudaStreamDestroy")
        self._streams.remove(stream)
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        failed = self._enter("cudaStreamSynchronize")
        assert stream not in self._captures
        return (failed or OK,)

    def cudaMemcpyAsync(self, target, source, count, kind, stream):
        self._enter("cudaMemcpyAsync")
        if kind != cudaMemcpyKind.cudaMemcpyDeviceToHost:
            self._check_device(target, count)
        if kind != cudaMemcpyKind.cudaMemcpyHostToDevice:
            self._check_device(source, count)
        self._enqueue(stream, lambda: ctypes.memmove(target, source, count))
        return (OK,)

    def cudaMemsetAsync(self, target, value, count, stream):
        self._enter("cudaMemsetAsync")
        self._check_device(target, count)
        self._enqueue(stream, lambda: ctypes.memset(target, value, count))
        return (OK,)

    def cudaMemcpy2DAsync(self, target, there, source, here, width, height, kind, stream):
        self._enter("cudaMemcpy2DAsync")
        self._check_device(target, there * (height - 1) + width)
        self._check_device(source, here * (height - 1) + width)
        assert width <= min(there, here)

        def work() -> None:
            for row in range(height):
                ctypes.memmove(target + row * there, source + row * here, width)

        self._enqueue(stream, work)
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        self._enter("cudaStreamBeginCapture")
        self._captures[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        failed = self._enter("cudaStreamEndCapture")
        work = self._captures.pop(stream)
        return (failed, None) if failed else (OK, work)

    def cudaGraphInstantiate(self, graph, flags):
        self._enter("cudaGraphInstantiate")
        return OK, tuple(graph)

    def cudaGraphLaunch(self, graph, stream):
        self._enter("cudaGraphLaunch")
        for work in graph:
            self._enqueue(stream, work)
        return (OK,)

    def cudaGraphDestroy(self, graph):
        self._enter("cudaGraphDestroy")
        return (OK,)

    def cudaGraphExecDestroy(self, graph):
        self._enter("cudaGraphExecDestroy")
        return (OK,)

    def cudaGetLastError(self):
        self._enter("cudaGetLastError")
        found, self._last_error = self._last_error, OK
        return (found,)

    def cudaGetErrorString(self, error):
        return OK, error.name.removeprefix("cudaError").encode()


def write_plan(
    path: Path, stage: str, profiles: Sequence[Mapping[str, Any]], *, scratch: int = 1000
) -> Path:
    """Write the plan of a stage; profiles are {input: (min, opt, max)}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = {"stage": stage, "profiles": list(profiles), "scratch": scratch}
    path.write_text("ftrt" + json.dumps(plan))
    return path


class TensorRTStandIn:
    """The module `tensorrt` or `tensorrt_rtx`, running the modules of one model on a CUDA."""

    def __init__(
        self,
        name: str,
        cuda: CudaStandIn,
        modules: Mapping[str, torch.nn.Module],
        stages_io: Mapping[str, StageIO],
    ) -> None:
        self.__name__, self.__version__ = name, "1.7.1"
        self._cuda, self._modules, self._io = cuda, modules, stages_io
        self._calls: list[tuple[Any, ...]] = []
        self._capturable, self._failing = True, ""
        self._failure = "Cuda failure:\n  an illegal memory access"
        self.Runtime = lambda log: Runtime(self, log)
        if name == "tensorrt_rtx":
            self.IRuntimeConfig = RuntimeConfig
        self.ILogger, self.TensorIOMode, self.DataType = Logger, TensorIOMode, DataType
        self.TensorLocation = TensorLocation
        self.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
        self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Logger:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = 1, 2


class TensorLocation(enum.Enum):
    DEVICE, HOST = 0, 1


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64, BOOL = range(5)


class ExecutionContextAllocationStrategy(enum.Enum):
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    EAGER = 1


_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}


class Runtime:
    def __init__(self, trt: TensorRTStandIn, log: Logger) -> None:
        self._trt, self._log = trt, log

    def deserialize_cuda_engine(self, serialized_engine):
        plan = bytes(serialized_engine)
        if not plan.startswith(b"ftrt"):
            self._log.log(Logger.ERROR, "header.magicTag == kEXPECTED_MAGIC_TAG\nfailed")
            return None
        return ICudaEngine(self._trt, self._log, json.loads(plan[4:]))


class RuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = None
        self._cache = None

    def set_execution_context_allocation_strategy(self, strategy):
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache):
        self._cache = cache
        return True


class RuntimeCache:
    def __init__(self) -> None:
        self._content = b"kernels"

    def deserialize(self, blob):
        if not blob.startswith(b"kernels"):
            return False
        self._content = blob
        return True

    def serialize(self):
        return self._content


class ICudaEngine:
    def __init__(self, trt: TensorRTStandIn, log: Logger, plan: dict[str, Any]) -> None:
        self._trt, self._log, self._plan = trt, log, plan
        self._stage = plan["stage"]
        self._io = trt._io[self._stage]
        self._specs = {**self._io.inputs, **self._io.outputs}
        self.num_io_tensors = len(self._specs)
        self.num_optimization_profiles = len(plan["profiles"])
        self.device_memory_size_v2 = plan["scratch"]

    def get_tensor_name(self, index):
        return list(self._specs)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._io.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType[_DTYPES[self._specs[name].dtype]]

    def get_tensor_location(self, name):
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name, profile_index):
        return self._plan["profiles"][profile_index][name]

    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, config):
        if isinstance(config, RuntimeConfig):
            kinds = DynamicShapesKernelSpecializationStrategy
            assert config.dynamic_shapes_kernel_specialization_strategy is kinds.EAGER
            assert config._cache is not None
        else:
            assert config is ExecutionContextAllocationStrategy.USER_MANAGED
        self._trt._calls.append(("create", self._stage))
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._trt = engine, engine._trt
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile: int | None = None
        self._memory: int | None = None

    def _note(self, call: str, *details: Any) -> None:
        self._trt._calls.append((call, self._engine._stage, *details))

    def set_device_memory(self, memory, size):
        assert memory % 256 == 0
        assert size >= self._engine.device_memory_size_v2
        self._trt._cuda._check_device(memory, size)
        self._memory = memory
        self._note("memory", memory)

    def set_optimization_profile_async(self, profile_index, stream_handle):
        assert self._profile is None, "a context stays at its profile"
        self._profile = profile_index
        self._note("profile", profile_index)
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self._engine._plan["profiles"][self._profile][name]
        fits = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        assert name not in self._shapes, "a context stays at its shapes"
        self._shapes[name] = tuple(shape)
        self._note("shape", name, tuple(shape))
        return fits

    def set_tensor_address(self, name, memory):
        assert memory, f"{name} has no address"
        assert memory % 256 == 0, f"{name} at {memory}"
        self._addresses[name] = memory
        self._note("address", name, memory)
        return True

    def is_stream_capturable(self, stream):
        return self._trt._capturable

    def execute_async_v3(self, stream_handle):
        engine = self._engine
        if self._trt._failing == engine._stage:
            engine._log.log(Logger.ERROR, self._trt._failure)
            return False
        assert self._memory is not None
        assert self._trt._cuda._last_error == OK, "TensorRT looks at it after every launch"
        io, shapes, addresses = engine._io, dict(self._shapes), dict(self._addresses)
        assert shapes.keys() == io.inputs.keys()
        assert addresses.keys() == {**io.inputs, **io.outputs}.keys()
        arrays = {n: SimpleNamespace(shape=shapes[n], dtype=io.inputs[n].dtype) for n in shapes}
        shapes |= io.output_shapes(io.check(arrays, engine._stage))
        for name, shape in shapes.items():
            size = array_bytes(shape, engine._specs[name].dtype)
            self._trt._cuda._check_device(addresses[name], size)
        self._note("enqueue", self._profile)
        self._trt._cuda._enqueue(stream_handle, lambda: self._compute(shapes, addresses))
        return True

    @torch.inference_mode()
    def _compute(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        self._note("compute")
        engine = self._engine
        views = {}
        for name, shape in shapes.items():
            dtype = engine._specs[name].dtype
            size = array_bytes(shape, dtype)
            if size:
                buffer = (ctypes.c_uint8 * size).from_address(addresses[name])
                views[name] = np.frombuffer(buffer, dtype).reshape(shape)
            else:
                views[name] = np.empty(shape, dtype)
        feeds = [torch.from_numpy(views[name].copy()) for name in engine._io.inputs]
        results = self._trt._modules[engine._stage](*feeds)
        for name, result in zip(engine._io.outputs, results, strict=True):
            views[name][...] = result.numpy()
