"""What the precision map promises: it is complete, and nothing else becomes narrow."""

import dataclasses
from collections import Counter

import onnx
import pytest
from onnx import TensorProto

from nsp.artifacts.weight_kinds import matches
from nsp.export.graph.dtypes import precision_map, stored_precision
from nsp.export.graph.narrow import at_precision
from nsp.export.stage_bytes import stage_bytes
from nsp.families.var.config import with_condition
from nsp.families.var.stages import stages
from nsp.families.var.system import VarSystem
from nsp.family.classes import ClassCondition
from nsp.family.registry import family
from tests.export.small import small_config

VAR = family("var")
# Used in training only: nothing of an engine holds them.
_TRAINING = ("vae.encoder.*", "vae.quant_conv.*", "vae.quantize.ema*")


def configs():
    text = small_config()
    plain = with_condition(text, ClassCondition(num_classes=5))
    shared = dataclasses.replace(
        plain, predictor=dataclasses.replace(plain.predictor, shared_aln=True)
    )
    unnormalised = dataclasses.replace(
        plain, predictor=dataclasses.replace(plain.predictor, attn_l2_norm=False)
    )
    return {"class": plain, "shared": shared, "unnormalised": unnormalised}


@pytest.mark.parametrize("name", ["text", "class", "shared", "unnormalised"])
def test_every_weight_an_engine_holds_has_exactly_one_declared_dtype(name, system):
    model = system if name == "text" else VarSystem(configs()[name])
    weights = stages(model.config, "delta", "float32")
    half = [p for each in weights.values() for p in each.half]
    full = [p for each in weights.values() for p in each.full]
    for parameter, _ in model.named_parameters():
        if not matches(parameter, _TRAINING):
            declared = (matches(parameter, half), matches(parameter, full))
            assert sum(declared) == 1, f"{parameter}: half, full = {declared}"


def test_only_declared_weights_become_narrow(system):
    weights = stages(system.config, "delta", "float32")
    narrowed = at_precision(system, weights, "fp16")
    half = [p for each in weights.values() for p in each.half]
    dtypes = {name: str(p.dtype) for name, p in narrowed.named_parameters()}
    assert {n for n, d in dtypes.items() if d == "torch.float16"} == {
        n for n in dtypes if matches(n, half)
    }
    assert {str(p.dtype) for p in system.parameters()} == {"torch.float32"}


def test_fp32_is_the_model_itself(system):
    assert at_precision(system, stages(system.config, "delta", "float32"), "fp32") is system


def test_an_fp16_step_keeps_its_cache_and_matrices_narrow_and_its_logits_wide(half_engines):
    folder, manifest = half_engines
    step = manifest.stages["step"][1]
    assert step.precision == "fp16"
    dtypes = {n: a.dtype for n, a in {**step.stage_io.inputs, **step.stage_io.outputs}.items()}
    assert {n for n, d in dtypes.items() if d == "float16"} == {
        *("text_k", "text_v", "past_k_0", "past_v_0", "new_k_0", "new_v_0")
    }
    assert dtypes["logits"] == dtypes["modulation"] == "float32"
    model = onnx.load(folder / next(iter(step.files)))
    matrices = [t for t in model.graph.initializer if len(t.dims) == 2 and min(t.dims) > 16]
    narrow = Counter(t.data_type == TensorProto.FLOAT16 for t in matrices)
    assert narrow[True] >= 7  # qkv, two projections, q, fc1, fc2, head
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    norms = [n for n in model.graph.node if n.op_type == "LayerNormalization"]
    assert norms
    assert {types[n.output[0]] for n in norms} == {TensorProto.FLOAT}


def test_the_manifest_records_the_map(half_engines):
    _, manifest = half_engines
    full, half = manifest.stages["decoder"]
    assert set(full.precision_map.values()) == {"float32"}
    assert half.precision_map["vae.decoder.*conv*"] == "float16"
    assert half.precision_map["vae.decoder.*norm*"] == "float32"


def test_a_stage_without_narrow_weights_is_fp32_in_every_precision():
    weights = stages(small_config(), "delta", "float32")
    assert stored_precision(weights["select"], "fp16") == "fp32"
    assert stored_precision(weights["step"], "bf16") == "bf16"
    assert precision_map(weights["step"], "bf16")["predictor.head.*"] == "bfloat16"


def test_planned_bytes_are_those_of_the_weights(small_checkpoint, half_engines):
    folder, manifest = half_engines
    sizes = stage_bytes(small_checkpoint, stages(small_config(), "delta", "float32"), "fp16")
    for stage in ("step", "decoder"):
        path = folder / next(iter(manifest.stages[stage][1].files))
        tensors = onnx.load(path).graph.initializer
        found = sum(t.ByteSize() for t in tensors)
        assert sizes[stage] == pytest.approx(found, rel=0.1), stage
