"""Graph lint: finds graphs that a builder would refuse, crash on or silently compute wrongly.

Every rule is a function (graph, build) -> findings. The rules come from measurements with ONNX
Runtime 1.31 and TensorRT-RTX 1.7 unless a rule names another source. ONNX's own checker infers
shapes; Polygraphy's loaders for folding constants and cutting graphs would need onnx-graphsurgeon.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from nsp.errors import ExportError
from nsp.export.graph import in_place_operator, quantize
from nsp.export.plan import PlannedBuild
from nsp.stage.backend import TENSORRT_RANKS
from nsp.stage.io import Axes

_DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
_OF_ONNXRUNTIME = tuple((of.DOMAIN, of.OPERATOR) for of in (in_place_operator, quantize))
_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Inputs of Attention beyond q, k, v and the mask, and the attributes TensorRT does not know.
_ATTENTION_INPUTS = {4: "past_key", 5: "past_value", 6: "nonpad_kv_seqlen"}
_ATTENTION_ATTRIBUTES = ("softcap", "softmax_precision", "qk_matmul_output_mode")
_RANDOM = (
    *("RandomUniform", "RandomUniformLike", "RandomNormal", "RandomNormalLike"),
    *("Multinomial", "Bernoulli"),
)


@dataclass(frozen=True)
class Finding:
    """One problem of a graph."""

    rule: str
    node: str
    message: str


class Graph:
    """A model's graph with the look-ups that rules need; large weights stay on disk."""

    def __init__(self, model: Any, path: Path | None = None) -> None:
        self.model, self.graph, self.path = model, model.graph, path

    @classmethod
    def load(cls, path: Path) -> "Graph":
        """Return the graph of an ONNX file."""
        return cls(onnx.load(path, load_external_data=False), path)

    @cached_property
    def producers(self) -> dict[str, Any]:
        """The node that makes each tensor."""
        return {name: node for node in self.graph.node for name in node.output}

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Initializers and Constant nodes whose values are in the file itself."""
        tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        for node in self.graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    tensors[node.output[0]] = attribute.t
        external = TensorProto.EXTERNAL
        return {name: t for name, t in tensors.items() if t.data_location != external}

    def value(self, name: str) -> Any:
        """Return a constant as an array, or None."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    @cached_property
    def types(self) -> dict[str, int]:
        """The element type of every tensor with a known type."""
        values = (*self.graph.input, *self.graph.output, *self.graph.value_info)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        return types | {tensor.name: tensor.data_type for tensor in self.graph.initializer}

    def input_axis(self, name: str) -> tuple[str, int] | None:
        """Return (graph input, axis) whose size the integer tensor `name` is, or None."""
        for _ in range(8):  # shape arithmetic between a Shape and its user is short
            node = self.producers.get(name)
            if node is None:
                return None
            if node.op_type == "Shape":
                start = next((a.i for a in node.attribute if a.name == "start"), 0)
                return node.input[0], int(start)
            if node.op_type not in ("Squeeze", "Unsqueeze", "Reshape", "Identity", "Cast"):
                return None
            name = node.input[0]
        return None


Rule: TypeAlias = Callable[[Graph, PlannedBuild], Iterator[Finding]]


def lint(graph: Graph, build: PlannedBuild) -> list[Finding]:
    """Return all problems of a graph for a build.

    ONNX's checker comes last, because the messages of the other rules are more precise.
    """
    rules = [*_EVERYWHERE, *(_COMPILED if build.profiles else _ONNXRUNTIME)]
    found = [finding for rule in rules for finding in rule(graph, build)]
    return found or list(_checker(graph, build))


def check_graph(path: Path, build: PlannedBuild) -> None:
    """Raise ExportError naming the first node and rule of a graph that must not be built."""
    findings = lint(Graph.load(path), build)
    if findings:
        first = findings[0]
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise ExportError(
            f"{build.stage} ({build.target} {build.precision}): node {first.node}: {first.message} "
            f"[{first.rule}]{more}"
        )


def _declared_tensors(graph: Graph, build: PlannedBuild) -> Iterator[Finding]:
    """Inputs and outputs must be as declared: order, dtype, and free axes that are still free."""
    for side, declared, values in (
        ("input", build.io.inputs, graph.graph.input),
        ("output", build.io.outputs, graph.graph.output),
    ):
        names = [value.name for value in values]
        if names != list(declared):
            missing = sorted(set(declared) ^ set(names)) or names
            yield Finding("declared-tensors", missing[0], f"the {side}s are not as declared")
            continue
        for value in values:
            problem = _type_problem(value.type.tensor_type, declared[value.name])
            if problem:
                yield Finding("declared-tensors", value.name, f"{side} {problem}")


def _type_problem(found: Any, declared: Axes) -> str | None:
    """Return the difference between a graph's tensor and its declaration in words."""
    if found.elem_type != _DTYPES[declared.dtype]:
        return f"is {TensorProto.DataType.Name(found.elem_type)}, declared {declared.dtype}"
    dims = found.shape.dim
    if len(dims) != len(declared.words):
        return f"has {len(dims)} axes, declared ({declared.axes})"
    for axis, (dim, word) in enumerate(zip(dims, declared.words, strict=True)):
        fixed = dim.HasField("dim_value")
        if word.isdigit() and not (fixed and dim.dim_value == int(word)):
            return f"axis {axis} is {dim.dim_value or dim.dim_param}, declared {word}"
        if not word.isdigit() and fixed:
            return f"axis {axis} became the constant {dim.dim_value}, declared {word}"
    return None


def _random(graph: Graph, build: PlannedBuild) -> Iterator[Finding]:
    """Random numbers must be inputs: seeds differ between runtimes, and TensorRT ignores them."""
    for node in graph.graph.node:
        if node.op_type in _RANDOM:
            yield Finding(
                "random", node.name, f"{node.op_type} draws random numbers inside the graph"
            )


def _operators(graph: Graph, build: PlannedBuild) -> Iterator[Finding]:
    """Only standard operators of the planned opset are allowed, and two of ONNX Runtime's own."""
    for opset in graph.model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version != build.opset:
            message = f"opset is {opset.version}, but {build.opset} is planned"
            yield Finding("operators", "graph", message)
    for node in graph.graph.node:
        if not build.profiles and (node.domain, node.op_type) in _OF_ONNXRUNTIME:
            continue
        if node.domain not in ("", "ai.onnx"):
            yield Finding("operators", node.name, f"{node.domain}.{node.op_type} is not standard")


def _float64(graph: Graph, build: PlannedBuild) -> Iterator[Finding]:
    """There must be no double precision: TensorRT has none, and it is never intended."""
    for name, kind in graph.types.items():
        if kind == TensorProto.DOUBLE:
            yield Finding("float64", name, "tensor is float64")
    for node in graph.graph.node:
        for attribute in node.attribute:
            to_double = attribute.name == "to" and attribute.i == TensorProto.DOUBLE
            if to_double or attribute.t.data_type == TensorProto.DOUBLE:
                yield Finding("float64", node.name, f"{node.op_type} makes float64")


def _half_range(graph: Graph, build: PlannedBuild) -> Iterator[Finding]:
    """There must be no infinite half-precision constants: a fully masked row would become NaN."""
    for name, tensor in graph.constants.items():
        if tensor.data_type in _HALF:
            values = np.asarray(numpy_helper.to_array(tensor), np.float32)
            if not np.isfinite(values).all():
                yield Finding("half-range", name, "half-precision constant is not finite")


def _bfloat16(graph: Graph, build: PlannedBuild) -> Iterator[Finding]:
    """ONNX Runtime's CPU has hardly any bfloat16 operators."""
    for name, kind in graph.types.items():
        if kind == TensorProto.BFLOAT16:
            yield Finding("bfloat16", name, "tensor is bfloat16")


def _attention(graph: Graph, build: PlannedBuild) -> Iterator[Finding]:
    """TensorRT refuses Attention with a cache or in fp32, and ignores nonpad_kv_seqlen.

    It crashes when query, key and value are the same tensor.
    """
    for node in graph.graph.node:
        if node.op_type != "Attention":
            continue
        for index, name in _ATTENTION_INPUTS.items():
            if len(node.input) > index and node.input[index]:
                yield Finding("attention", node.name, f"Attention with {name}")
        if len([name for name in node.output if name]) > 1:
            yield Finding("attention", node.name, "Attention with several outputs")
        for attribute in node.attribute:
            if attribute.name in _ATTENTION_ATTRIBUTES and (attribute.f or attribute.i):
                yield Finding("attention", node.name, f"Attention with {attribute.name}")
        if len(set(node.input[:3])) == 1:
            yield Finding("attention", node.name, "query, key and value are the same tensor")
        if graph.types.get(node.input[0]) == TensorProto.FLOAT:
            yield Finding("attention", node.name, "Attention in float32; export at opset 18")


def _topk(graph: Graph, build: PlannedBuild) -> Iterator[Finding]:
    """TensorRT's TopK allows K < 3840 in every profile.

    It refuses a larger constant, but builds a larger range of sizes without an error.
    """
    for node in graph.graph.node:
        if node.op_type != "TopK":
            continue
        known = graph.value(node.input[1])
        axis = graph.input_axis(node.input[1])
        if known is not None:
            largest = int(np.max(known))
        elif axis is not None and axis[0] in build.io.inputs:
            largest = max(_largest(profile, *axis) for profile in build.profiles)
        else:
            yield Finding("topk", node.name, "K is neither a constant nor the size of an input")
            continue
        if largest > TENSORRT_RANKS:
            message = f"K goes up to {largest}, but TensorRT allows {TENSORRT_RANKS}"
            yield Finding("topk", node.name, message)


def _largest(profile: Mapping[str, Any], name: str, axis: int) -> int:
    return int(profile[name][2][axis])


def _resize(graph: Graph, build: PlannedBuild) -> Iterator[Finding]:
    """TensorRT refuses Resize with antialiasing."""
    for node in graph.graph.node:
        if node.op_type == "Resize" and any(a.name == "antialias" and a.i for a in node.attribute):
            yield Finding("resize", node.name, "Resize with antialiasing")


def _checker(graph: Graph, build: PlannedBuild) -> Iterator[Finding]:
    """ONNX's own rules: known operators, matching types and shapes, existing weight files."""
    try:
        onnx.checker.check_model(graph.path or graph.model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield Finding("checker", build.stage, " ".join(str(error).split())[:300])


_EVERYWHERE: tuple[Rule, ...] = (_declared_tensors, _random, _operators, _float64, _half_range)
_ONNXRUNTIME: tuple[Rule, ...] = (_bfloat16,)
_COMPILED: tuple[Rule, ...] = (_attention, _topk, _resize)
