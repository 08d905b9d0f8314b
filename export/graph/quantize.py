"""Eight-bit matrix products for CPUs: weights are rounded once, activations in every run."""

from pathlib import Path

import onnx_ir

from nsp.export.graph.onnx_export import quiet, save


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
