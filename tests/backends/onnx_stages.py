"""Writes small ONNX models by hand, so that the runtime is tested without the exporter."""

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from nsp.stage.io import StageIO

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


def write_model(path: Path, io: StageIO, nodes: list[onnx.NodeProto]) -> Path:
    """Write a graph with the tensors of `io` and return its path."""
    inputs, outputs = (
        [helper.make_tensor_value_info(n, _TYPES[s.dtype], None) for n, s in side.items()]
        for side in (io.inputs, io.outputs)
    )
    graph = helper.make_graph(nodes, "stage", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def write_hollow_model(path: Path, io: StageIO) -> Path:
    """Write a graph that loads as the stage `io` and computes nothing: every output is a scalar."""
    nodes = [
        helper.make_node(
            "Constant", [], [name], value=helper.make_tensor(name, _TYPES[spec.dtype], [], [0])
        )
        for name, spec in io.outputs.items()
    ]
    return write_model(path, io, nodes)


def write_hollow_models(folder: Path, stages_io: Mapping[str, StageIO]) -> dict[str, Path]:
    """Write one hollow graph per stage."""
    return {s: write_hollow_model(folder / s / "model.onnx", io) for s, io in stages_io.items()}
