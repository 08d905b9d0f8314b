"""Reads the fixtures in this folder; README.md here says how they were made."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from nsp.families.var.config import PredictorConfig, VaeConfig, VarConfig
from nsp.family.classes import ClassCondition

GOLDEN_DIR = Path(__file__).parent


@cache
def tensors(name: str) -> dict[str, Tensor]:
    """Return the tensors of a file, floats as float32."""
    loaded = load_file(GOLDEN_DIR / f"{name}.safetensors")
    return {k: v.float() if v.is_floating_point() else v for k, v in loaded.items()}


@cache
def document(name: str) -> Any:
    """Return a JSON file."""
    return json.loads((GOLDEN_DIR / f"{name}.json").read_text())


def part(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name starts with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def vae_config(arguments: dict[str, Any]) -> VaeConfig:
    """Return our configuration for the constructor arguments of a quantizer fixture."""
    return VaeConfig(
        vocab_size=arguments["vocab_size"],
        latent_channels=arguments["Cvae"],
        base_channels=32,
        commitment_weight=arguments["beta"],
        using_znorm=arguments["using_znorm"],
        quant_resi=arguments["quant_resi"],
        share_quant_resi=arguments["share_quant_resi"],
    )


def variant_config(name: str) -> VarConfig:
    """Return our configuration of a model in `var_variants`."""
    a = document("config")["var_variants"][name]
    return VarConfig(
        patch_nums=tuple(a["patch_nums"]),
        vae=VaeConfig(vocab_size=64, latent_channels=8, base_channels=32),
        predictor=PredictorConfig(
            depth=a["depth"],
            width=a["embed_dim"],
            num_heads=a["num_heads"],
            mlp_ratio=a["mlp_ratio"],
            shared_aln=a["shared_aln"],
            attn_l2_norm=a["attn_l2_norm"],
            cond_drop_rate=0.0,
        ),
        condition=ClassCondition(num_classes=a["num_classes"]),
    )
