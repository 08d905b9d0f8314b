"""The operator of ONNX Runtime for attention in layout "in_place" (nsp/layers/in_place.py).

`GroupQueryAttention` is not an operator of ONNX, so only graphs for ONNX Runtime have it. Where the
arrays of past and present are the same, it writes the new token there and copies nothing.
Source: onnxruntime, docs/ContribOperators.md.
"""

from collections.abc import Callable
from typing import Any

DOMAIN, OPERATOR = "com.microsoft", "GroupQueryAttention"

_FLOATS, _INT32 = "T", "M"
_INT32_CODE = 6  # ONNX's number of the type
_TURNED_WIDTH = 16  # the operator turns only heads of a multiple of this width
_INPUTS = (
    *(("query", _FLOATS), ("key", _FLOATS), ("value", _FLOATS)),
    *(("past_key", _FLOATS), ("past_value", _FLOATS)),
    *(("seqlens_k", _INT32), ("total_sequence_length", _INT32)),
    *(("cos_cache", _FLOATS), ("sin_cache", _FLOATS)),
    *(("position_ids", "tensor(int64)"), ("attention_bias", _FLOATS)),
)
_OUTPUTS = ("output", "present_key", "present_value")
_ATTRIBUTES = ("num_heads", "kv_num_heads", "do_rotary", "rotary_interleaved", "scale")


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return for torch's exporter how our operators become ONNX's, at opset 23 or later."""
    import torch
    from onnxscript import opset23 as op

    import nsp.layers.in_place  # noqa: F401  # registers the operator

    attend = _operator()

    def translated(
        packed: Any, past_k: Any, past_v: Any, positions: Any, table: Any, bias: Any, scale: float
    ) -> Any:
        """Return the node's outputs, after adding the nodes that make its inputs."""
        num_shared, width = past_k.shape[1], past_k.shape[3]
        num_heads = packed.shape[2] // width - 2 * num_shared
        zero, one = (op.Constant(value_ints=[i]) for i in range(2))
        most = op.Constant(value_ints=[packed.shape[2]])
        end = op.Add(op.Slice(positions, zero, one), one)
        cos = sin = None
        if table is not None:
            cos, sin = (op.Gather(table, op.Constant(value_int=i), axis=2) for i in range(2))
        turns = table is not None and width % _TURNED_WIDTH == 0
        if table is not None and not turns:
            num_turned = num_heads + num_shared
            split, last = (op.Constant(value_ints=[i]) for i in (num_turned * width, -1))
            turned, values = (
                op.Slice(packed, zero, split, last),
                op.Slice(packed, split, most, last),
            )
            at = op.Unsqueeze(positions, one)
            turned = op.RotaryEmbedding(turned, cos, sin, at, interleaved=1, num_heads=num_turned)
            packed, cos, sin = op.Concat(turned, values, axis=-1), None, None
        if bias is not None:
            bias = op.Slice(bias, zero, end, op.Constant(value_ints=[3]))
        return attend(
            packed,
            *(None, None, past_k, past_v),
            *(op.Cast(positions, to=_INT32_CODE), op.Squeeze(op.Cast(end, to=_INT32_CODE))),
            *(cos, sin, None, bias),
            num_heads=num_heads,
            kv_num_heads=num_shared,
            scale=scale,
            do_rotary=int(turns),
            rotary_interleaved=int(turns),
        )

    return {torch.ops.nsp.attend_in_place.default: translated}


def _operator() -> Callable[..., Any]:
    """Return the operator for onnxscript, which knows only those of ONNX."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    required, optional = (
        OpSchema.FormalParameterOption.Single,
        OpSchema.FormalParameterOption.Optional,
    )
    schema = OpSchema(
        OPERATOR,
        DOMAIN,
        1,
        inputs=[
            OpSchema.FormalParameter(name, kind, param_option=optional if i else required)
            for i, (name, kind) in enumerate(_INPUTS)
        ],
        outputs=[OpSchema.FormalParameter(name, _FLOATS) for name in _OUTPUTS],
        type_constraints=[
            (_FLOATS, ["tensor(float)", "tensor(float16)"], ""),
            (_INT32, ["tensor(int32)"], ""),
        ],
        attributes=[
            OpSchema.Attribute(
                name, OpSchema.AttrType.FLOAT if name == "scale" else OpSchema.AttrType.INT, ""
            )
            for name in _ATTRIBUTES
        ],
    )
    operator: Callable[..., Any] = Op(Opset(DOMAIN, 1), OPERATOR, schema)
    return operator
