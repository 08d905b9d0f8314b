"""New models start as the published trainer starts them."""

import math

import pytest
import torch

from nsp.families.var.config import (
    SIZES,
    ClassCondition,
    PredictorConfig,
    VaeConfig,
    VarConfig,
    size,
    with_condition,
)
from nsp.families.var.model import NextScaleTransformer, initialize


def test_initialization_follows_the_published_rules() -> None:
    torch.manual_seed(0)
    width, depth = 128, 4
    config = VarConfig(
        patch_nums=(1, 2, 3),
        vae=VaeConfig(vocab_size=256, latent_channels=8, base_channels=32),
        predictor=PredictorConfig(depth=depth, width=width, num_heads=4),
        condition=ClassCondition(num_classes=10),
    )
    model = NextScaleTransformer(config)
    initialize(model, adaln=0.5, adaln_gamma=1e-3, head=0.02)
    std = math.sqrt(1 / width / 3)
    block = model.blocks[1]
    ada = block.ada_lin[1].weight
    expected = {
        "qkv": (block.attn.mat_qkv.weight, std),
        "proj": (block.attn.proj.weight, std / math.sqrt(2 * depth)),
        "fc2": (block.ffn.fc2.weight, std / math.sqrt(2 * depth)),
        "gamma": (ada[: 2 * width], std * 1e-3),
        "scale and shift": (ada[2 * width :], std * 0.5),
        "head norm": (model.head_nm.ada_lin[1].weight, std * 0.5),
        "head": (model.head.weight, std * 0.02),
        "positions": (model.pos_1LC, std),
        "classes": (model.class_emb.weight, std),
    }
    for name, (tensor, value) in expected.items():
        assert tensor.std().item() == pytest.approx(value, rel=0.05), name
    assert not block.ffn.fc1.bias.any()
    assert not block.ada_lin[1].bias.any()
    torch.testing.assert_close(block.attn.scale_mul_1H11, torch.full((1, 4, 1, 1), math.log(4)))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("d16", 310.3), ("d20", 600.9), ("d24", 1033), ("d30", 2010), ("d36-s", 2354)],
)
def test_published_sizes_have_their_published_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = NextScaleTransformer(SIZES[name])
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=2e-3)


def test_any_size_takes_a_text_condition() -> None:
    text = SIZES["tiny"].condition
    with torch.device("meta"):
        model = NextScaleTransformer(with_condition(size("d16"), text))
    assert hasattr(model.blocks[0], "cross")
    assert not hasattr(model, "class_emb")
