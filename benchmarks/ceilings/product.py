"""One large float32 matrix product by ONNX Runtime: what a machine's arithmetic is held against.

Its best time is the peak of a machine; run in every round of a measurement it is the yardstick of
that moment, since the speed of a shared machine changes from minute to minute.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.benchmarks.record.times import Observation

GEMM = "GEMM"  # the contender's name


def product_gflop(side: int) -> float:
    """Return the work of a product of two square matrices."""
    return 2e-9 * side**3


def onnxruntime_product(
    a: NDArray[np.float32], b: NDArray[np.float32], *, threads: int
) -> Callable[[], Any] | None:
    """Return what computes a @ b, b a constant; None where a package is missing."""
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError:
        return None
    helper, shape = onnx.helper, list(a.shape)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["y"])],
        "product",
        [helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"a": a})


class Product:
    """The product as a contender; it ignores the request."""

    name = GEMM

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute = compute

    @classmethod
    def contenders(cls, side: int, *, threads: int) -> list["Product"]:
        """Return the one there is; none where ONNX Runtime is missing."""
        a, b = (np.random.default_rng(s).standard_normal((side, side), np.float32) for s in (0, 1))
        compute = onnxruntime_product(a, b, threads=threads)
        return [] if compute is None else [cls(compute)]

    def observe(self, request: Mapping[str, Any], *, number: int, place: int) -> Observation:
        """Return the time of one product."""
        start = time.perf_counter()
        self._compute()
        wall_ms = round(1e3 * (time.perf_counter() - start), 4)
        return Observation(
            contender=self.name, round=number, place=place, wall_ms=wall_ms, stage_ms={}
        )
