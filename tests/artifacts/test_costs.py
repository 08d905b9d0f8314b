import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nsp.benchmarks.flops import TextEncoderSize, Work, stage_work, var_work
from nsp.families.var.config import SIZES, ClassCondition, VarConfig
from nsp.families.var.system import VarSystem
from nsp.family.registry import family
from nsp.stage.io import sample_arrays

AXES = {"B": 2, "G": 4, "N": 2, "L": 9, "P": 5, "R": 1, "p": 3, "q": 3, "r": 4, "c": 4}


def counted_by_torch(module: torch.nn.Module, arrays: dict[str, Any]) -> int:
    """Return torch's count; without fused attention, whose operations it does not know on a CPU."""
    tensors = [torch.from_numpy(array) for array in arrays.values()]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*tensors)
    return counter.get_total_flops()


def assert_same_counts(system: VarSystem, text_encoder: TextEncoderSize | None) -> None:
    config = system.config
    declared = family("var").stages_io(config, kv_layout="delta", dtype="float32")
    stages = family("var").learner.modules(system, "delta")
    ours, theirs = {}, {}
    for name, module in stages.items():
        work = var_work(config, name, AXES, text_encoder)
        ours[name] = None if work is None else work.flops
        theirs[name] = counted_by_torch(module, sample_arrays(declared[name], AXES))
    assert ours == theirs


def test_operations_of_a_text_model_are_those_torch_counts(
    tiny_checkpoint: Path, tiny_system: VarSystem
) -> None:
    assert_same_counts(tiny_system, TextEncoderSize.read(tiny_checkpoint))


@pytest.mark.parametrize(
    "vae", [{}, {"share_quant_resi": 0, "quant_conv_kernel": 1}, {"quant_resi": 0.0}]
)
@pytest.mark.parametrize("predictor", [{}, {"shared_aln": True, "mlp_ratio": 2.5}])
def test_operations_of_class_models_are_those_torch_counts(
    vae: dict[str, Any], predictor: dict[str, Any]
) -> None:
    tiny = SIZES["tiny"]
    config = VarConfig(
        patch_nums=tiny.patch_nums,
        vae=dataclasses.replace(tiny.vae, patch_size=2, num_res_blocks=2, **vae),
        predictor=dataclasses.replace(tiny.predictor, **predictor),
        condition=ClassCondition(num_classes=5),
    )
    assert_same_counts(VarSystem(config).eval(), None)


def test_what_cannot_be_counted_is_none(tiny_system: VarSystem) -> None:
    assert var_work(tiny_system.config, "text_encoder", AXES, None) is None
    assert stage_work("another family", None, "step", AXES, None) is None


def test_a_published_size_needs_the_operations_it_is_known_to_need() -> None:
    """VAR d16, batch 1 with guidance: 0.60 TFLOP in ten scales, its decoder 0.394 TFLOP."""
    config = SIZES["d16"]
    work, past = Work(), 0
    for side in config.patch_nums:
        work = work + var_work(config, "step", {"G": 2, "L": side**2, "P": past})
        past += side**2
    decoder = var_work(config, "decoder", {"B": 1})
    assert decoder is not None
    assert work.flops == pytest.approx(0.60e12, rel=0.05)
    assert decoder.flops == pytest.approx(0.394e12, rel=0.02)
    assert work.weights / len(config.patch_nums) == pytest.approx((310e6 - 103e6), rel=0.05)
