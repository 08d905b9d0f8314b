"""Reads published VAR weights: official state dicts in, a checkpoint folder out.

Values that follow from shapes are inferred; the others come from the given constructor arguments of
the public code. Source of names: github.com/FoundationVision/VAR, models/var.py, models/vqvae.py,
models/quant.py.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsp.artifacts.checkpoint import check_new_checkpoint
from nsp.artifacts.systems import save_checkpoint
from nsp.errors import CheckpointError, ConfigError
from nsp.families.var.config import SCHEDULES, VarConfig
from nsp.families.var.system import VarSystem
from nsp.family.classes import ClassCondition
from nsp.weights.arguments import arguments_of, check_parts
from nsp.weights.module_weights import bounded, load_state, rounded_to_eight_bits
from nsp.weights.state_names import (
    VAR_PREDICTOR,
    VAR_TOKENIZER,
    count_of,
    find_state,
    kind_of,
    part_of_a_model,
    shape_of,
    what_it_is,
)
from nsp.weights.weight_files import read_tensor_file

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
# Fields that tensors give up to rounding (a width) or in another form (0: as many as scales).
_ROUGHLY_TOLD = ("mlp_ratio", "default_qresi_counts")
logger = logging.getLogger(__name__)


def convert(
    *, tokenizer: Path, predictor: Path, config: Mapping[str, Any] | None, output_dir: Path
) -> VarConfig:
    """Write the checkpoint folder `output_dir` from published weights; return its configuration.

    `config` may hold constructor arguments under "vae" and "var". Raises CheckpointError naming a
    file that holds something else, or a missing, extra, misshapen, mistyped or non-finite tensor;
    ConfigError for an argument that is unknown, out of range or contradicted by the tensors.
    """
    check_new_checkpoint(output_dir)
    given = _arguments(config or {})
    vae_state = read_state(tokenizer, part="vae_local")
    var_state = read_state(predictor, part="var_wo_ddp")
    var_config = infer_config(
        vae_state, var_state, **given, tokenizer=str(tokenizer), predictor=str(predictor)
    )
    usage = (len(var_config.patch_nums), var_config.vae.vocab_size)
    if vae_state.get("quantize.ema_vocab_hit_SV", torch.empty(0)).shape != usage:
        # A usage statistic may be missing or for another schedule: several models share a
        # tokenizer.
        vae_state["quantize.ema_vocab_hit_SV"] = torch.zeros(usage)
    shapes = [tensor.shape for state in (vae_state, var_state) for tensor in state.values()]
    with bounded(shapes, f"{tokenizer.name} and {predictor.name}"):
        system = VarSystem(var_config)
    for module, state, path in (
        (system.vae, vae_state, tokenizer),
        (system.predictor, var_state, predictor),
    ):
        try:
            load_state(module, state, str(path))
        except CheckpointError as error:
            if shard := part_of_a_model(path):
                raise CheckpointError(f"{path} {shard} ({error})") from error
            raise
    notes: dict[str, Any] = {
        "converted_from": {"tokenizer": tokenizer.name, "predictor": predictor.name}
    }
    for name, state in (("tokenizer", vae_state), ("predictor", var_state)):
        if eight := rounded_to_eight_bits(state):
            notes.setdefault("rounded_to_8_bits", {})[name] = eight
    save_checkpoint(output_dir, system, notes=notes)
    return var_config


def _arguments(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the constructor arguments under "vae" and "var"; a warning names other keys."""
    check_parts(config, ("vae", "var"))
    return {part: arguments_of(config, part) for part in ("vae", "var")}


def read_state(path: Path, *, part: str) -> dict[str, Tensor]:
    """Return the state dict in `path`, with the model's own names.

    The file is read by its content, wrappers and prefixes are seen through (state_names.py); the
    public trainer nests the state dict as ['trainer'][part].
    """
    return find_state(read_tensor_file(path), path, part=part)


def infer_config(
    vae_state: Mapping[str, Tensor],
    var_state: Mapping[str, Tensor],
    *,
    vae: Mapping[str, Any],
    var: Mapping[str, Any],
    tokenizer: str = "tokenizer",
    predictor: str = "predictor",
) -> VarConfig:
    """Return the configuration from shapes and, for other values, from the given arguments.

    `tokenizer` and `predictor` are the files, for errors. Raises CheckpointError for tensors of
    something else, ConfigError for an argument that is unknown or contradicts the tensors.
    """
    with _naming(tokenizer, vae_state, VAR_TOKENIZER):
        vae_fields = _vae_fields(vae_state)
    with _naming(predictor, var_state, VAR_PREDICTOR):
        var_fields = _predictor_fields(var_state)
        patch_nums = _schedule(var_state, var.get("patch_nums") or vae.get("v_patch_nums"))
        num_classes = shape_of(var_state, "class_emb.weight", 2)[0] - 1
    told = {"patch_nums": patch_nums, "num_classes": num_classes, "v_patch_nums": patch_nums}
    vae_fields |= _renamed(vae, _VAE_ARGUMENTS, "vae", {**told, **vae_fields})
    var_fields |= _renamed(var, _VAR_ARGUMENTS, "var", {**told, **var_fields})
    if "num_heads" not in var_fields:
        # Without q/k normalisation, the weights do not show the number of heads.
        width, depth = var_fields["width"], var_fields["depth"]
        if width != 64 * depth:
            raise ConfigError(
                "these weights do not show the number of heads; give "
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


@contextmanager
def _naming(path: str, state: Mapping[str, Tensor], wanted: str) -> Iterator[None]:
    """Add to an error the file it is about and, if that is not `wanted`, what it is instead.

    A ConfigError, which is about the arguments, stays as it is.
    """
    try:
        yield
    except CheckpointError as error:
        if shard := part_of_a_model(Path(path)):
            said = f"{path} {shard} ({error})"
        elif kind_of(state) == wanted:
            said = f"{path}: {error}; a part of {wanted} is missing, or it is another variant"
        else:
            said = f"{path} {what_it_is(Path(path), state)}; give {wanted} ({error})"
        raise CheckpointError(said) from error


def _vae_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of VaeConfig that follow from shapes."""
    vocab_size, channels = shape_of(state, "quantize.embedding.weight", 2)
    base, colours = shape_of(state, "encoder.conv_in.weight", 4)[:2]
    levels = range(count_of(state, r"encoder\.down\.(\d+)\."))
    widths = [shape_of(state, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in levels]
    fields = {
        "vocab_size": vocab_size,
        "latent_channels": channels,
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "num_res_blocks": count_of(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "patch_size": round((colours / 3) ** 0.5),
        "quant_conv_kernel": shape_of(state, "quant_conv.weight", 4)[-1],
    }
    partial = count_of(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    separate = count_of(state, r"quantize\.quant_resi\.(\d+)\.")
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
    """Return the fields of PredictorConfig that follow from shapes."""
    width = shape_of(state, "word_embed.weight", 2)[0]
    l2_norm = "blocks.0.attn.scale_mul_1H11" in state
    fields = {
        "depth": count_of(state, r"blocks\.(\d+)\."),
        "width": width,
        "mlp_ratio": shape_of(state, "blocks.0.ffn.fc1.weight", 2)[0] / width,
        "shared_aln": "shared_ada_lin.1.weight" in state,
        "attn_l2_norm": l2_norm,
    }
    if l2_norm:
        fields["num_heads"] = shape_of(state, "blocks.0.attn.scale_mul_1H11", 4)[1]
    return fields


def _schedule(state: Mapping[str, Tensor], given: Any) -> list[int]:
    """Return patch_nums from the level of every token, if the file has them.

    Without levels they are the `given` ones, or the only published schedule with as many tokens.
    """
    if "lvl_1L" not in state:
        return _schedule_without_levels(state, given)
    shape_of(state, "lvl_1L", 2)
    _, counts = np.unique(state["lvl_1L"].double().numpy(), return_counts=True)
    sides = [math.isqrt(int(count)) for count in counts]
    if [side**2 for side in sides] != counts.tolist() or sides != sorted(set(sides)):
        raise CheckpointError(
            f"tensor lvl_1L has levels of {counts.tolist()} tokens; the scales of a model are "
            "growing squares"
        )
    return sides


def _schedule_without_levels(state: Mapping[str, Tensor], given: Any) -> list[int]:
    num_tokens = shape_of(state, "pos_1LC", 3)[1]
    num_scales = shape_of(state, "lvl_embed.weight", 2)[0]
    if given is None:
        for sides in SCHEDULES.values():
            if (sum(side**2 for side in sides), len(sides)) == (num_tokens, num_scales):
                logger.info("the weights do not have lvl_1L; their schedule is %s", list(sides))
                return list(sides)
    elif (
        isinstance(given, list)
        and all(type(side) is int and side > 0 for side in given)
        and (sum(side**2 for side in given), len(given)) == (num_tokens, num_scales)
    ):
        return given
    raise ConfigError(
        f"the weights do not have lvl_1L, and {num_tokens} tokens in {num_scales} scales do not "
        'show the schedule; give the right {"var": {"patch_nums": [1, 2, ...]}} with --config'
    )


def _renamed(
    arguments: Mapping[str, Any], table: Mapping[str, str | None], where: str, told: dict[str, Any]
) -> dict[str, Any]:
    """Return our fields for constructor arguments.

    Raises ConfigError for an unknown argument, and for one that contradicts the tensors.
    """
    for name, given in arguments.items():
        if name not in table:
            raise ConfigError(
                f"--config: {where}.{name} is not an argument; known: {', '.join(table)}"
            )
        field = table[name] or name
        if field in told and field not in _ROUGHLY_TOLD and given != told[field]:
            raise ConfigError(
                f"--config: {where}.{name}={given!r} contradicts the weights, which have "
                f"{told[field]!r}; omit it"
            )
    return {field: arguments[name] for name, field in table.items() if field and name in arguments}
