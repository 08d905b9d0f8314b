"""What keeps the stand-in honest: it has no name that CUDA's bindings and TensorRT lack."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from nsp.backends.tensorrt import cuda, replay
from nsp.backends.tensorrt import trt_backend as tensorrt
from nsp.backends.tensorrt import trt_engine as tensorrt_engine
from nsp.backends.tensorrt.trt_engine import Runtime, import_tensorrt
from nsp.errors import EngineError
from tests.backends import nvidia

# What stands in for each class of TensorRT; "DLL" names of both flavours are the same.
CLASSES = {
    "Runtime": nvidia.Runtime,
    "ICudaEngine": nvidia.ICudaEngine,
    "IExecutionContext": nvidia.IExecutionContext,
    "IRuntimeConfig": nvidia.RuntimeConfig,
    "IRuntimeCache": nvidia.RuntimeCache,
    "ILogger": nvidia.Logger,
}
ENUMS = (
    nvidia.TensorIOMode,
    nvidia.TensorLocation,
    nvidia.DataType,
    nvidia.ExecutionContextAllocationStrategy,
    nvidia.DynamicShapesKernelSpecializationStrategy,
)
MODULES = (cuda, replay, tensorrt, tensorrt_engine)


def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx")


def public(owner: object) -> set[str]:
    return {name for name in vars(owner) if not name.startswith("_")}


@pytest.mark.parametrize("name", CLASSES)
def test_tensorrt_rtx_has_every_name_of_the_stand_in(name: str) -> None:
    real = getattr(rtx(), name)
    stand_in = CLASSES[name]
    assert public(stand_in) - {"log"} <= set(dir(real))
    fields = {
        word
        for word in re.findall(r"self\.([a-z]\w*) = ", inspect.getsource(stand_in))
        if not word.startswith("_")
    }
    assert fields <= set(dir(real))


@pytest.mark.parametrize("name", [n for n, c in CLASSES.items() if n != "ILogger"])
def test_methods_take_the_arguments_of_the_real_ones(name: str) -> None:
    real = getattr(rtx(), name)
    for method, function in inspect.getmembers(CLASSES[name], inspect.isfunction):
        if method.startswith("_"):
            continue
        given = len(inspect.signature(function).parameters) - 1
        text = getattr(real, method).__doc__  # pybind11 writes the signatures there
        counts = [
            len([part for part in arguments.split(",") if ":" in part]) - 1
            for arguments in re.findall(rf"{method}\((self: .*)\) ->", text)
        ]
        assert given in counts, f"{name}.{method} takes {counts} arguments, not {given}"


@pytest.mark.parametrize("stand_in", ENUMS, ids=lambda kind: kind.__name__)
def test_enumerations_have_the_members_of_the_stand_in(stand_in: Any) -> None:
    real = getattr(rtx(), stand_in.__name__)
    assert {member.name for member in stand_in} <= set(dir(real))


def test_the_cuda_runtime_has_every_name_used() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    used = {
        word
        for module in MODULES
        for word in re.findall(r"\b(?:runtime|_runtime)\.(cuda\w+)", inspect.getsource(module))
    }
    used |= set(re.findall(r'"(cuda[A-Z]\w+)"', inspect.getsource(cuda)))
    assert len(used) >= 20
    assert used <= set(dir(real))
    assert public(nvidia.CudaStandIn) - {"calls"} <= set(dir(real))
    for kind in (nvidia.cudaError_t, nvidia.cudaMemcpyKind, nvidia.cudaStreamCaptureMode):
        members = getattr(real, kind.__name__).__members__
        assert {name: int(value) for name, value in kind.__members__.items()} == {
            name: int(members[name]) for name in kind.__members__
        }


def test_the_engine_path_names_no_torch() -> None:
    for module in MODULES:
        assert not re.search(r"^\s*(import|from) torch", inspect.getsource(module), re.MULTILINE)


def test_the_real_runtime_refuses_a_damaged_plan_in_one_line(tmp_path: Path) -> None:
    rtx()
    path = tmp_path / "engine.plan"
    path.write_bytes(b"no plan" * 100)
    runtime = Runtime("tensorrt_rtx", None)  # type: ignore[arg-type]  # memory is not short here
    with pytest.raises(EngineError) as caught:
        runtime.engine(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged, or built for another GPU or version")
    assert "\n" not in message
    assert import_tensorrt("tensorrt_rtx") is importlib.import_module("tensorrt_rtx")
