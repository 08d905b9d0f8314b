"""Writes small GraphDef files, byte by byte: the other side of nsp/evaluation/graph_def.py."""

import struct
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Value: TypeAlias = bool | int | float | str | list[int] | NDArray[np.generic]
TYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9}


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(array: NDArray[np.generic], *, listed: bool = False) -> bytes:
    sizes = b"".join(field(2, field(1, size)) for size in array.shape)
    start = field(1, TYPES[array.dtype.name]) + field(2, sizes)
    if not listed:
        return start + field(4, array.tobytes())
    if array.dtype.kind == "f":
        return start + field({"float32": 5, "float64": 6}[array.dtype.name], array.tobytes())
    packed = b"".join(varint(int(each)) for each in array.ravel())
    return start + field({"int32": 7, "int64": 10}[array.dtype.name], packed)


def attribute(value: Value) -> bytes:
    if isinstance(value, bool):
        return field(5, int(value))
    if isinstance(value, int):
        return field(3, value)
    if isinstance(value, float):
        return varint(4 << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, str):
        return field(2, value.encode())
    if isinstance(value, list):
        return field(1, field(3, b"".join(varint(each) for each in value)))
    return field(8, tensor(value))


def node(name: str, op: str, inputs: Iterable[str] = (), **attributes: Value | bytes) -> bytes:
    content = field(1, name.encode()) + field(2, op.encode())
    content += b"".join(field(3, each.encode()) for each in inputs)
    for key, value in attributes.items():
        encoded = value if isinstance(value, bytes) else attribute(value)
        content += field(5, field(1, key.encode()) + field(2, encoded))
    return field(1, content)


def constant(name: str, array: NDArray[np.generic], *, listed: bool = False) -> bytes:
    return node(name, "Const", value=field(8, tensor(array, listed=listed)))


def graph(nodes: Iterable[bytes]) -> bytes:
    return b"".join(nodes) + field(4, field(1, 22))  # versions, which come last


def constants(arrays: Mapping[str, NDArray[np.generic]]) -> list[bytes]:
    return [constant(name, array) for name, array in arrays.items()]


def small_inception(seed: int = 0, *, features: int = 6, classes: int = 5) -> bytes:
    """A graph with the names and operations of the evaluator's, for pictures of any size."""
    random = np.random.default_rng(seed)

    def weights(*shape: int) -> NDArray[np.generic]:
        return (random.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)

    nodes = [
        node("DecodeJpeg/contents", "Const", value=field(8, field(1, 7) + field(8, b"jpeg"))),
        node("DecodeJpeg", "DecodeJpeg", ["DecodeJpeg/contents"]),
        constant("ExpandDims/dim", np.array(0, np.int32), listed=True),
        node("ExpandDims", "ExpandDims", ["DecodeJpeg", "ExpandDims/dim"]),
        constant("ResizeBilinear/size", np.array([19, 19], np.int32)),
        node("ResizeBilinear", "ResizeBilinear", ["ExpandDims", "ResizeBilinear/size"]),
        constant("Sub/y", np.array(128, np.float32), listed=True),
        node("Sub", "Sub", ["ResizeBilinear", "Sub/y"]),
        constant("Mul/y", np.array(0.0078125, np.float32)),
        node("Mul", "Mul", ["Sub", "Mul/y"]),
    ]

    def conv(name: str, source: str, channels: int, count: int, side: int, stride: int) -> None:
        shapes = {"mean": weights(count), "variance": weights(count) ** 2 + 0.5}
        shapes |= {"beta": weights(count), "gamma": weights(count) + 1}
        nodes.extend(constants({f"{name}/{n}": a for n, a in shapes.items()}))
        nodes.append(constant(f"{name}/conv2d_params", weights(side, side, channels, count)))
        around = ["mean", "variance", "beta", "gamma"]
        nodes.extend(
            (
                node(
                    f"{name}/Conv2D",
                    "Conv2D",
                    [source, f"{name}/conv2d_params"],
                    strides=[1, stride, stride, 1],
                    padding="SAME",
                ),
                node(
                    f"{name}/batchnorm",
                    "BatchNormWithGlobalNormalization",
                    [f"{name}/Conv2D", *(f"{name}/{each}" for each in around)],
                    variance_epsilon=0.001,
                    scale_after_normalization=False,
                ),
                node(f"{name}/CheckNumerics", "CheckNumerics", [f"{name}/batchnorm"], message="x"),
                node(
                    f"{name}/control",
                    "Identity",
                    [f"{name}/batchnorm:0", f"^{name}/CheckNumerics"],
                ),
                node(name, "Relu", [f"{name}/control"]),
            )
        )

    pool = {"ksize": [1, 3, 3, 1], "strides": [1, 1, 1, 1], "padding": "SAME"}
    conv("conv", "Mul", 3, 8, 3, 2)
    nodes.append(node("pool", "MaxPool", ["conv"], **{**pool, "strides": [1, 2, 2, 1]}))
    conv("mixed_6/conv", "pool", 8, 8, 1, 1)
    nodes.append(node("mixed_6/tower/pool", "AvgPool", ["pool"], **pool))
    conv("mixed_6/tower", "mixed_6/tower/pool", 8, features - 4, 1, 1)
    conv("mixed_6/other", "pool", 8, 4, 3, 1)
    nodes += [
        constant("mixed_6/join/dim", np.array(3, np.int32)),
        node("mixed_6/join", "Concat", ["mixed_6/join/dim", "mixed_6/tower", "mixed_6/other"]),
        node(
            "pool_3",
            "AvgPool",
            ["mixed_6/join"],
            ksize=[1, 5, 5, 1],
            strides=[1, 1, 1, 1],
            padding="VALID",
        ),
        constant("softmax/weights", weights(features, classes)),
        constant("softmax/biases", weights(classes)),
        node("pool_3/_reshape", "Reshape", ["pool_3"]),
        node("softmax/logits/MatMul", "MatMul", ["pool_3/_reshape", "softmax/weights"]),
        node("softmax/logits", "BiasAdd", ["softmax/logits/MatMul", "softmax/biases"]),
        node("softmax", "Softmax", ["softmax/logits"]),
    ]
    return graph(nodes)
