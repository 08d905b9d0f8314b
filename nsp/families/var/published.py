"""Reads published VAR weights: official state dicts in, a checkpoint folder out.

What shapes tell is inferred; the rest comes from the constructor arguments of the public code,
where they are given. Source of names: github.com/FoundationVision/VAR, models/var.py,
models/vqvae.py, models/quant.py.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsp.checkpoint import is_checkpoint
from nsp.errors import CheckpointError, ConfigError
from nsp.families.var.checkpoint import save_checkpoint
from nsp.families.var.config import ClassCondition, VarConfig
from nsp.families.var.system import VarSystem
from nsp.weights import load_state, read_safetensors

# Constructor argument of the public code -> our field; None: has no effect on inference.
_VAE_ARGUMENTS = {
    "vocab_size": "vocab_size",
    "z_channels": "latent_channels",
    "ch": "base_channels",
    "dropout": "dropout",
    "beta": "commitment_weight",
    "using_znorm": "using_znorm",
    "quant_conv_ks": "quant_conv_kernel",
    "quant_resi": "quant_resi",
    "share_quant_resi": "share_quant_resi",
    "default_qresi_counts": "default_qresi_counts",
    "v_patch_nums": None,
    "test_mode": None,
}
_VAR_ARGUMENTS = {
    "num_classes": None,
    "depth": "depth",
    "embed_dim": "width",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "drop_rate": "dropout",
    "attn_drop_rate": None,
    "drop_path_rate": "drop_path_rate",
    "norm_eps": "norm_eps",
    "shared_aln": "shared_aln",
    "cond_drop_rate": "cond_drop_rate",
    "attn_l2_norm": "attn_l2_norm",
    "patch_nums": None,
    "flash_if_available": None,
    "fused_if_available": None,
}
# Fields that tensors tell up to rounding (a width) or by another name (0: as many as scales).
_ROUGHLY_TOLD = ("mlp_ratio", "default_qresi_counts")


def convert(
    *, tokenizer: Path, predictor: Path, config: Mapping[str, Any] | None, output_dir: Path
) -> VarConfig:
    """Write the checkpoint folder `output_dir` from published weights; return its configuration.

    `config` may hold constructor arguments under "vae" and "var". Raises CheckpointError naming a
    missing, extra, misshapen or non-finite tensor, ConfigError for an argument that is unknown,
    out of range or contradicted by the tensors.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"{output_dir} is a file; choose another --output-dir")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not is_checkpoint(output_dir):
        raise ConfigError(
            f"{output_dir} is not empty and no checkpoint; choose another --output-dir"
        )
    given = {"vae": {}, "var": {}, **(config or {})}
    for part, arguments in given.items():
        if part not in ("vae", "var"):
            raise ConfigError(f"--config: unknown key {part!r}; known: vae, var")
        if not isinstance(arguments, Mapping):
            raise ConfigError(f"--config: {part} must hold constructor arguments as an object")
    vae_state = read_state(tokenizer, part="vae_local")
    var_state = read_state(predictor, part="var_wo_ddp")
    var_config = infer_config(vae_state, var_state, vae=given["vae"], var=given["var"])
    system = VarSystem(var_config)
    usage = system.vae.quantize.ema_vocab_hit_SV
    if vae_state.get("quantize.ema_vocab_hit_SV", usage).shape != usage.shape:
        # A usage statistic of another schedule: one tokenizer serves several.
        vae_state["quantize.ema_vocab_hit_SV"] = torch.zeros_like(usage)
    load_state(system.vae, vae_state, str(tokenizer))
    load_state(system.predictor, var_state, str(predictor))
    notes = {"converted_from": {"tokenizer": tokenizer.name, "predictor": predictor.name}}
    save_checkpoint(output_dir, system, notes=notes)
    return var_config


def read_state(path: Path, *, part: str) -> dict[str, Tensor]:
    """Return the float32 state dict in `path` (.safetensors, else a torch file).

    The public trainer nests it as ['trainer'][part]; both forms are taken.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give the file of a published state dict")
    if path.suffix == ".safetensors":
        state: Any = read_safetensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes make an unpickler fail in any way there is
            # torch's own text advises to load it all the same, running what code is in it.
            raise CheckpointError(
                f"{path} cannot be read as weights only: it is damaged, or holds other things than "
                "tensors; save its state dict alone, best as .safetensors"
            ) from error
    if isinstance(state, Mapping) and isinstance(state.get("trainer"), Mapping):
        state = state["trainer"].get(part)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(
            f"{path} holds no state dict (names to tensors), nor one under trainer/{part}"
        )
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def infer_config(
    vae_state: Mapping[str, Tensor],
    var_state: Mapping[str, Tensor],
    *,
    vae: Mapping[str, Any],
    var: Mapping[str, Any],
) -> VarConfig:
    """Return the configuration from shapes, with what these do not tell from the arguments given.

    Raises ConfigError for an argument that is unknown or contradicts the tensors.
    """
    vae_fields, var_fields = _vae_fields(vae_state), _predictor_fields(var_state)
    patch_nums = _schedule(var_state)
    num_classes = _shape(var_state, "class_emb.weight", 2)[0] - 1
    told = {"patch_nums": patch_nums, "num_classes": num_classes, "v_patch_nums": patch_nums}
    vae_fields |= _renamed(vae, _VAE_ARGUMENTS, "vae", {**told, **vae_fields})
    var_fields |= _renamed(var, _VAR_ARGUMENTS, "var", {**told, **var_fields})
    if "num_heads" not in var_fields:
        # Nothing in the weights tells the heads apart without q/k normalisation.
        width, depth = var_fields["width"], var_fields["depth"]
        if width != 64 * depth:
            raise ConfigError(
                "the number of heads does not follow from these weights; give "
                '{"var": {"num_heads": H}} with --config'
            )
        var_fields["num_heads"] = depth
    return VarConfig.from_dict(
        {
            "patch_nums": patch_nums,
            "vae": vae_fields,
            "predictor": var_fields,
            "condition": ClassCondition(num_classes=num_classes).to_dict(),
        }
    )


def _vae_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of VaeConfig that shapes tell."""
    vocab_size, channels = _shape(state, "quantize.embedding.weight", 2)
    base, colours = _shape(state, "encoder.conv_in.weight", 4)[:2]
    levels = range(_count(state, r"encoder\.down\.(\d+)\."))
    widths = [_shape(state, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in levels]
    fields = {
        "vocab_size": vocab_size,
        "latent_channels": channels,
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "num_res_blocks": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "patch_size": round((colours / 3) ** 0.5),
        "quant_conv_kernel": _shape(state, "quant_conv.weight", 4)[-1],
    }
    partial = _count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    separate = _count(state, r"quantize\.quant_resi\.(\d+)\.")
    if "quantize.quant_resi.qresi.weight" in state:
        fields["share_quant_resi"] = 1
    elif partial:
        fields["share_quant_resi"] = partial
    elif separate:
        fields |= {"share_quant_resi": 0, "default_qresi_counts": separate}
    else:
        fields["quant_resi"] = 0.0
    return fields


def _predictor_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of PredictorConfig that shapes tell."""
    width = _shape(state, "word_embed.weight", 2)[0]
    l2_norm = "blocks.0.attn.scale_mul_1H11" in state
    fields = {
        "depth": _count(state, r"blocks\.(\d+)\."),
        "width": width,
        "mlp_ratio": _shape(state, "blocks.0.ffn.fc1.weight", 2)[0] / width,
        "shared_aln": "shared_ada_lin.1.weight" in state,
        "attn_l2_norm": l2_norm,
    }
    if l2_norm:
        fields["num_heads"] = _shape(state, "blocks.0.attn.scale_mul_1H11", 4)[1]
    return fields


def _schedule(state: Mapping[str, Tensor]) -> list[int]:
    """Return patch_nums from the level of every token."""
    _shape(state, "lvl_1L", 2)
    _, counts = np.unique(state["lvl_1L"].numpy(), return_counts=True)
    sides = [math.isqrt(int(count)) for count in counts]
    if [side**2 for side in sides] != counts.tolist() or sides != sorted(set(sides)):
        raise CheckpointError(
            f"tensor lvl_1L holds levels of {counts.tolist()} tokens; the scales of a model are "
            "growing squares"
        )
    return sides


def _renamed(
    arguments: Mapping[str, Any], table: Mapping[str, str | None], where: str, told: dict[str, Any]
) -> dict[str, Any]:
    """Return our fields for constructor arguments.

    Raises ConfigError for an unknown one, and for one that differs from what the tensors have told.
    """
    for name, given in arguments.items():
        if name not in table:
            raise ConfigError(f"--config: {where}.{name} is no argument; known: {', '.join(table)}")
        field = table[name] or name
        if field in told and field not in _ROUGHLY_TOLD and given != told[field]:
            raise ConfigError(
                f"--config: {where}.{name}={given!r} contradicts the weights, which are of a model "
                f"with {told[field]!r}; leave it out"
            )
    return {field: arguments[name] for name, field in table.items() if field and name in arguments}


def _shape(state: Mapping[str, Tensor], name: str, num_axes: int) -> torch.Size:
    """Return the shape of a tensor every such model has, with that many axes and not empty."""
    if name not in state:
        raise CheckpointError(f"missing tensor {name}: these are no weights of this kind of model")
    shape = state[name].shape
    if len(shape) != num_axes or 0 in shape:
        raise CheckpointError(
            f"misshapen tensor {name} {tuple(shape)}: these are no weights of this kind of model"
        )
    return shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest index `pattern` captures; 0 without a match."""
    found = (re.match(pattern, name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)
