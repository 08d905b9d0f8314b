"""Runs a frozen TensorFlow graph with torch: the operations of the ADM evaluator's Inception.

Tensors are NHWC, as in the graph. Each operation does what TensorFlow 1 does, which differs from
torch in three ways: padding SAME may be uneven, averages leave padding out of the count, and
bilinear resizing takes output pixel i from input i * (in / out), without half a pixel.

Source: tensorflow/core/kernels (conv_ops, pooling_ops_common, resize_bilinear_op with
LegacyScaler, batch_norm_op).
"""

from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nsp.errors import DataError, lacks_memory, one_line
from nsp.evaluation.graph_def import Node

_MAX_ELEMENTS = 1 << 24  # of one picture after one operation; Inception has 1.5 million
_MAX_STRIDE = 64


class FrozenGraph:
    """The part of a graph that some results need, its constants on a device."""

    def __init__(
        self,
        nodes: Mapping[str, Node],
        results: Sequence[str],
        *,
        placeholder: str,
        device: torch.device,
        source: str,
    ) -> None:
        """Find the part of the graph between the node `placeholder` and `results`.

        `source` names the file in errors. Raises DataError for a result that is missing, an
        operation that is not known, and a circle.
        """
        self._nodes, self._results, self._source = nodes, results, source
        self._placeholder = placeholder
        self._order = self._needed()
        self._last: dict[str, str] = {}  # the node after which a tensor is not needed
        self._constants: dict[str, Tensor] = {}
        for name in self._order:
            self._last |= dict.fromkeys(self._inputs(name), name)
            node = self._nodes[name]
            if node.op == "Const":
                with self._named(node):
                    array = np.array(node.constant())
                    self._constants[name] = torch.from_numpy(array).to(device)
            elif node.op not in OPERATIONS and name != placeholder:
                raise DataError(
                    f"{source}: node {name} is a {node.op}, which is not an operation of the ADM "
                    "evaluator's graph"
                )

    def run(self, value: Tensor) -> list[Tensor]:
        """Return the results for the placeholder's `value`; DataError names a node that fails."""
        ready = {self._placeholder: value}
        for name in self._order:
            node, inputs = self._nodes[name], self._inputs(name)
            if name != self._placeholder and node.op != "Const":
                with self._named(node):
                    tensors = [
                        self._constants[n] if n in self._constants else ready[n] for n in inputs
                    ]
                    ready[name] = OPERATIONS[node.op](node, tensors)
            for each in inputs:
                if self._last[each] == name and each not in self._results:
                    ready.pop(each, None)
        return [ready[n] if n in ready else self._constants[n] for n in self._results]

    def _inputs(self, name: str) -> tuple[str, ...]:
        """Return the nodes whose first result a node reads; ones that only come before are none."""
        if name == self._placeholder:
            return ()
        found = [each for each in self._nodes[name].inputs if not each.startswith("^")]
        return tuple(each.removesuffix(":0") for each in found)

    def _needed(self) -> list[str]:
        """Return all nodes that the results need, each after its inputs."""
        graph: dict[str, tuple[str, ...]] = {}
        left = list(self._results)
        while left:
            name = left.pop()
            if name not in self._nodes:
                raise DataError(
                    f"{self._source} has no node {name!r}; the ADM evaluator's graph is "
                    "classify_image_graph_def.pb"
                )
            if name not in graph:
                graph[name] = self._inputs(name)
                left += graph[name]
        try:
            return list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            raise DataError(
                f"{self._source}: its nodes depend on each other in a circle"
            ) from error

    def _named(self, node: Node) -> "_Named":
        return _Named(f"{self._source}: node {node.name} ({node.op})")


class _Named:
    """Turns whatever goes wrong in a node into one line that names it."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or lacks_memory(error):
            return
        if isinstance(error, ValueError | RuntimeError | IndexError | TypeError | OverflowError):
            raise DataError(f"{self._where} cannot be computed: {one_line(str(error))}") from error


def _check_elements(per_picture: int) -> None:
    if per_picture > _MAX_ELEMENTS:
        raise ValueError(f"{per_picture} numbers for one picture are too many")


def _window(node: Node, name: str) -> tuple[int, int]:
    """Return the height and width of an attribute (1, height, width, 1)."""
    sizes = node.integers(name)
    if (
        len(sizes) != 4
        or sizes[0] != 1
        or sizes[3] != 1
        or not all(1 <= size <= _MAX_STRIDE for size in sizes)
    ):
        raise ValueError(f"attribute {name} is {sizes}")
    if node.text("data_format", "NHWC") != "NHWC":
        raise ValueError("its data format is not NHWC")
    return sizes[1], sizes[2]


def _padded(
    image_NCHW: Tensor, node: Node, window: tuple[int, int], strides: tuple[int, int], fill: float
) -> Tensor:
    """Return the picture with the node's padding; what is left over at SAME goes to the end."""
    padding = node.text("padding", "")
    if padding == "VALID":
        return image_NCHW
    if padding != "SAME":
        raise ValueError(f"its padding is {padding!r}")
    sides = []
    for size, length, stride in zip(image_NCHW.shape[2:], window, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + length - size, 0)
        sides.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = sides
    return F.pad(image_NCHW, (left, right, top, bottom), value=fill)


def _channels_first(image_NHWC: Tensor) -> Tensor:
    if image_NHWC.ndim != 4:
        raise ValueError(f"its input has shape {tuple(image_NHWC.shape)}")
    return image_NHWC.permute(0, 3, 1, 2)


def _conv(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    image_NHWC, weight_HWIO = inputs
    strides = _window(node, "strides")
    if "dilations" in node.attributes and set(node.integers("dilations")) != {1}:
        raise ValueError("it is dilated")
    image_NCHW = _channels_first(image_NHWC)
    height, width, _, count = weight_HWIO.shape
    _check_elements(image_NCHW.shape[2] * image_NCHW.shape[3] * count)
    padded = _padded(image_NCHW, node, (height, width), strides, 0.0)
    return F.conv2d(padded, weight_HWIO.permute(3, 2, 0, 1), stride=strides).permute(0, 2, 3, 1)


def _max_pool(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    window, strides = _window(node, "ksize"), _window(node, "strides")
    padded = _padded(_channels_first(inputs[0]), node, window, strides, -torch.inf)
    return F.max_pool2d(padded, window, strides).permute(0, 2, 3, 1)


def _average_pool(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    window, strides = _window(node, "ksize"), _window(node, "strides")
    image_NCHW = _channels_first(inputs[0])
    padded = _padded(image_NCHW, node, window, strides, 0.0)
    inside = _padded(torch.ones_like(image_NCHW[:1, :1]), node, window, strides, 0.0)
    total = F.avg_pool2d(padded, window, strides, divisor_override=1)
    count = F.avg_pool2d(inside, window, strides, divisor_override=1)
    return (total / count).permute(0, 2, 3, 1)


def _batch_norm(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    image_NHWC, mean_C, variance_C, beta_C, gamma_C = inputs
    gain_C = (variance_C + node.number("variance_epsilon", 0.001)).rsqrt()
    if node.number("scale_after_normalization", False):
        gain_C = gain_C * gamma_C
    return (image_NHWC - mean_C) * gain_C + beta_C


def _join(values: Sequence[Tensor], axis: Tensor) -> Tensor:
    if sum(each.numel() for each in values) > _MAX_ELEMENTS * max(1, values[0].shape[0]):
        raise ValueError("its result is too large")
    return torch.cat(list(values), dim=int(axis))


def _binary(
    compute: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Node, Sequence[Tensor]], Tensor]:
    def run(node: Node, inputs: Sequence[Tensor]) -> Tensor:
        one, other = inputs
        if torch.broadcast_shapes(one.shape, other.shape) != one.shape:
            raise ValueError(f"shapes {tuple(one.shape)} and {tuple(other.shape)} do not fit")
        return compute(one, other)

    return run


def _resize(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    image_NHWC, size = inputs
    height, width = (int(each) for each in size)
    if node.number("align_corners", False) or node.number("half_pixel_centers", False):
        raise ValueError("it aligns corners or centres")
    _check_elements(height * width * image_NHWC.shape[3])
    return resize_bilinear(image_NHWC, height, width)


def resize_bilinear(image_NHWC: Tensor, height: int, width: int) -> Tensor:
    """Return pictures of another size as TensorFlow 1 resizes them; float32."""
    top, bottom, down_H = _places(image_NHWC.shape[1], height, image_NHWC.device)
    left, right, across_W = _places(image_NHWC.shape[2], width, image_NHWC.device)
    across_W1, down_H11 = across_W[:, None], down_H[:, None, None]

    def row(rows: Tensor) -> Tensor:
        image = image_NHWC[:, rows]
        one, other = image[:, :, left], image[:, :, right]
        return one + (other - one) * across_W1

    upper, lower = row(top), row(bottom)
    return upper + (lower - upper) * down_H11


def _places(size: int, wanted: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two source pixels of every wanted one, and the weight of the second."""
    step = torch.tensor(size, dtype=torch.float32) / wanted
    place = torch.arange(wanted, dtype=torch.float32) * step
    first = place.floor()
    second = (first + 1).clamp_max(size - 1)
    moved = [each.to(device) for each in (first.long(), second.long(), place - first)]
    return moved[0], moved[1], moved[2]


OPERATIONS: Mapping[str, Callable[[Node, Sequence[Tensor]], Tensor]] = {
    "AvgPool": _average_pool,
    "BatchNormWithGlobalNormalization": _batch_norm,
    "CheckNumerics": lambda node, inputs: inputs[0],
    "Concat": lambda node, inputs: _join(inputs[1:], inputs[0]),
    "ConcatV2": lambda node, inputs: _join(inputs[:-1], inputs[-1]),
    "Conv2D": _conv,
    "Identity": lambda node, inputs: inputs[0],
    "MaxPool": _max_pool,
    "Mul": _binary(torch.mul),
    "Relu": lambda node, inputs: inputs[0].relu(),
    "ResizeBilinear": _resize,
    "Sub": _binary(torch.sub),
}
