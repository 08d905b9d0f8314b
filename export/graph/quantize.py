"""Eight-bit matrix products for CPUs: weights are rounded once, activations in every run."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from nsp.export.graph.onnx_export import quiet, save

# Of ONNX Runtime, not of ONNX (onnxruntime, docs/ContribOperators.md).
DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
_BLOCK = 128  # weights of one scale
_ZERO = 128  # the code of weight 0 in unsigned weights
_INTEGERS = 4  # the operator's accuracy level at which activations have eight bits as well


def quantize(path: Path) -> None:
    """Replace the model at `path` by one that computes products with constant matrices in integers.

    Weights have one scale per column. They are unsigned, because on a CPU without VNNI, sums of
    products of unsigned activations with signed weights saturate in 16 bits.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    metadata = dict(onnx_ir.load(path).metadata_props)
    narrow = path.with_name("quantized.onnx")
    with quiet("root"):  # hides a hint to infer shapes first, which the exporter has done
        quantize_dynamic(
            path,
            narrow,
            op_types_to_quantize=["MatMul"],
            weight_type=QuantType.QUInt8,
            per_channel=True,
            use_external_data_format=True,
        )
    model = onnx_ir.external_data.load_to_model(onnx_ir.load(narrow))
    save(model, path.parent, metadata)
    for leftover in path.parent.glob(f"{narrow.name}*"):
        leftover.unlink()


def quantize_blocks(path: Path) -> None:
    """Do the same with one scale for every 128 weights of a column, for products of a few rows.

    The operator reads weights once and as they lie in memory: products of two rows take 0.7 times
    as long as those of `quantize`, and their errors are smaller.
    """
    model = onnx.load(path)
    metadata = {each.key: each.value for each in model.metadata_props}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    narrowed = set[str]()
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and len(weight.dims) == 2:
            _narrow(model.graph, node, weight)
            narrowed.add(weight.name)
    used = {name for node in model.graph.node for name in node.input}
    left = narrowed - used
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in left]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    if all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    save(onnx_ir.serde.deserialize_model(model), path.parent, metadata)


def _narrow(graph: onnx.GraphProto, node: onnx.NodeProto, weight: onnx.TensorProto) -> None:
    """Make a node the product with a narrow copy of its matrix, which is added to the graph."""
    rows, columns = weight.dims
    names = [f"{weight.name}_codes", f"{weight.name}_scales"]
    for name, array in zip(names, in_blocks(numpy_helper.to_array(weight)), strict=True):
        if all(each.name != name for each in graph.initializer):
            graph.initializer.append(numpy_helper.from_array(array, name))
    node.op_type, node.domain = OPERATOR, DOMAIN
    node.input[1:] = names
    sizes = {"K": rows, "N": columns, "bits": 8, "block_size": _BLOCK, "accuracy_level": _INTEGERS}
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(key, value) for key, value in sizes.items())


def in_blocks(weight_KN: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return the codes (N, M, 128) and the scales (N, M) of a matrix with M blocks in a column.

    A weight is (code - 128) times the scale of its block; the last block is filled with zeros.
    """
    rows, columns = weight_KN.shape
    padded = np.pad(weight_KN, ((0, -rows % _BLOCK), (0, 0)))
    blocks_NMK = np.ascontiguousarray(padded.T, np.float32).reshape(columns, -1, _BLOCK)
    scales_NM = np.abs(blocks_NMK).max(2) / (_ZERO - 1)
    safe_NM1 = np.where(scales_NM == 0, 1, scales_NM)[..., None]
    codes = np.rint(blocks_NMK / safe_NM1) + _ZERO
    return codes.astype(np.uint8), scales_NM.astype(np.float32)
