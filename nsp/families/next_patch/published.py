"""Reads published LlamaGen weights: state dicts of tokenizer and transformer in, a checkpoint out.

Models trained by next-patch prediction have the same names. Values that follow from shapes are
inferred; the others come from the constructor arguments of the public code. Source of names:
github.com/FoundationVision/LlamaGen, autoregressive/models/gpt.py, tokenizer/tokenizer_image.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, normalizers
from tokenizers.normalizers import Normalizer
from torch import Tensor

from nsp.artifacts.checkpoint import check_new_checkpoint, is_checkpoint
from nsp.artifacts.systems import save_checkpoint
from nsp.errors import CheckpointError, ConfigError
from nsp.families.next_patch.config import GPT_SIZES, CaptionCondition, NextPatchConfig
from nsp.families.next_patch.model import Gpt
from nsp.families.next_patch.system import NextPatchSystem
from nsp.family.classes import ClassCondition
from nsp.raster.vq import VqTokenizer
from nsp.text.t5 import pretrained_t5
from nsp.values import integer
from nsp.weights.arguments import arguments_of, check_parts, contradiction, naming, renamed
from nsp.weights.module_weights import bounded, compare_shapes, joined, load_state, load_weights
from nsp.weights.state_names import count_of, find_state, shape_of, what_it_is
from nsp.weights.weight_files import read_tensor_file

# Constructor argument of the public code -> our field; None: nothing here depends on it.
_VQ_ARGUMENTS = {
    "codebook_size": "codebook_size",
    "codebook_embed_dim": "codebook_width",
    "codebook_l2_norm": "is_normalised",
    "commit_loss_beta": "commitment_weight",
    "entropy_loss_ratio": "entropy_weight",
    "ch": "base_channels",
    "encoder_ch_mult": "channel_multipliers",
    "decoder_ch_mult": "channel_multipliers",
    "num_res_blocks": "num_res_blocks",
    "z_channels": "latent_channels",
    "dropout_p": "dropout",
    **dict.fromkeys(("codebook_show_usage", "in_channels", "out_channels", "norm")),
    **dict.fromkeys(("image_size", "latent_size", "downsample")),
}
_GPT_ARGUMENTS = {
    "dim": "width",
    "n_layer": "depth",
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "multiple_of": "multiple_of",
    "ffn_dim_multiplier": "ffn_dim_multiplier",
    "rope_base": "rope_base",
    "norm_eps": "norm_eps",
    "token_dropout_p": "token_dropout",
    "resid_dropout_p": "resid_dropout",
    "ffn_dropout_p": "ffn_dropout",
    "drop_path_rate": "drop_path_rate",
    "class_dropout_prob": "cond_drop_rate",
    **dict.fromkeys(("vocab_size", "num_classes", "caption_dim", "cls_token_num", "model_type")),
    **dict.fromkeys(("block_size", "max_batch_size", "max_seq_len", "initializer_range")),
    **dict.fromkeys(("attn_dropout_p", "ffn_hidden_dim", "head_dim")),
}
_CAPTION_SAMPLING = {"guidance_scale": 7.5, "top_k": 1000}  # of the public program
_DEFAULT_SIDE = 16  # 256 px at a downsampling of 16
_USUAL_HEAD = 64
_USED = "quantize.codebook_used"  # a statistic of the public trainer
_TABLE = "freqs_cis"  # old checkpoints keep their rotations
_QKV = ("q", "k", "v")
_TOKENIZER, _PREDICTOR = "quantize.embedding.weight", "tok_embeddings.weight"  # all have these
logger = logging.getLogger(__name__)


def convert(
    *,
    tokenizer: Path,
    predictor: Path,
    text_encoder: Path | None = None,
    config: Mapping[str, Any] | None,
    output_dir: Path,
) -> NextPatchConfig:
    """Write the checkpoint folder `output_dir` from published weights; return its configuration.

    `text_encoder` is the T5 folder of a model of captions. `config` may hold constructor arguments
    under "vq" and "gpt", and the side of the grid of codes under "grid". Raises CheckpointError
    naming a file that holds something else, or a missing, extra, misshapen or non-finite tensor;
    ConfigError for an argument that is unknown or contradicts the tensors.
    """
    check_new_checkpoint(output_dir)
    vq_state = _read(tokenizer, "tokenizer", _TOKENIZER)
    gpt_state = _read(predictor, "predictor", _PREDICTOR)
    model = infer_config(vq_state, gpt_state, config or {}, tokenizer, predictor)
    gpt_state.pop(_TABLE, None)
    encoder = prompts = None
    if model.caption is not None:
        if text_encoder is None:
            raise ConfigError(
                f"{predictor} is a model of captions; give its T5 folder with --text-encoder "
                "(the published ones read Flan-T5-XL)"
            )
        prompts, encoder = pretrained_t5(text_encoder, model.caption.max_tokens)
        prompts = prompts.after(_cleaning())
    elif text_encoder is not None:
        raise ConfigError(f"{predictor} is a model of classes; omit --text-encoder")
    shapes = [tensor.shape for state in (vq_state, gpt_state) for tensor in state.values()]
    with bounded(shapes, f"{tokenizer.name} and {predictor.name}"):
        system = NextPatchSystem(model, text_encoder=encoder, prompt_tokenizer=prompts)
    load_state(system.vq, with_our_names(system.vq, vq_state, str(tokenizer)), str(tokenizer))
    load_state(system.gpt, gpt_state, str(predictor))
    files = {"tokenizer": tokenizer.name, "predictor": predictor.name}
    sampling = {} if model.caption is None else _CAPTION_SAMPLING
    save_checkpoint(output_dir, system, notes={"converted_from": files}, sampling=sampling)
    return model


def _cleaning() -> list[Normalizer]:
    """Return rules by which captions become like those that the published models learnt from.

    The public program cleans prompts as its training did (language/t5.py): these are its rules that
    change common captions. Those about HTML, file names and article numbers are left out.
    """
    return [
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"(https?://|www\.)\S+"), ""),
        normalizers.Replace(Regex(r"\p{Pd}+"), "-"),
        normalizers.Replace(Regex("[\u2018\u2019]"), "'"),
        normalizers.Replace(Regex("[`\u00b4\u00ab\u00bb\u201c\u201d]"), '"'),
        normalizers.Replace(
            Regex(r"[#&@~()\[\]{}|\\/*\u00a1-\u00bf]+|\.{2,}|[\u2022\u2122]+"), " "
        ),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]


def load_pretrained(system: NextPatchSystem, config: NextPatchConfig) -> None:
    """Load the weights that a new model begins with, if any; raises CheckpointError like `convert`.

    They come from a published file, or from a checkpoint folder of this family.
    """
    parts: tuple[tuple[VqTokenizer | Gpt, str, str | None], ...] = (
        (system.vq, "vq", config.pretrained_vq),
        (system.gpt, "gpt", config.pretrained_gpt),
    )
    for module, part, place in parts:
        if place is None:
            continue
        if is_checkpoint(Path(place)):
            load_weights(module, Path(place) / part)
        elif isinstance(module, VqTokenizer):
            state = _read(Path(place), "tokenizer", _TOKENIZER)
            load_state(module, with_our_names(module, state, place), place)
        else:
            state = _read(Path(place), "predictor", _PREDICTOR)
            state.pop(_TABLE, None)
            load_state(module, state, place)


def _read(path: Path, option: str, mark: str) -> dict[str, Tensor]:
    """Return the state dict in a file; CheckpointError if it has not the tensor `mark`."""
    state = find_state(read_tensor_file(path), path)
    if mark in state:
        return state
    other = {_TOKENIZER: "tokenizer", _PREDICTOR: "predictor"}
    if found := next((name for key, name in other.items() if key in state), None):
        raise CheckpointError(f"{path} holds the {found} of LlamaGen; give it with --{found}")
    raise CheckpointError(
        f"{path} {what_it_is(path, state)}; give the {option} of LlamaGen (missing tensor {mark})"
    )


def infer_config(
    vq_state: Mapping[str, Tensor],
    gpt_state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokenizer: Path = Path("tokenizer"),
    predictor: Path = Path("predictor"),
) -> NextPatchConfig:
    """Return the configuration from shapes and, for other values, from the given arguments.

    Errors name the files; they are as in `convert`.
    """
    check_parts(config, ("vq", "gpt", "grid"))
    vq, gpt = arguments_of(config, "vq"), arguments_of(config, "gpt")
    with naming(tokenizer):
        vq_told = _vq_fields(vq_state)
        vq_fields = vq_told | renamed(vq, _VQ_ARGUMENTS, "vq", vq_told)
    with naming(predictor):
        num_codes = shape_of(gpt_state, _PREDICTOR, 2)[0]
        if num_codes != vq_told["codebook_size"]:
            raise CheckpointError(
                f"the transformer knows {num_codes} codes, but {tokenizer} has "
                f"{vq_told['codebook_size']}; give the tokenizer it was trained with"
            )
        condition = _condition(gpt_state)
        gpt_fields = _gpt_fields(gpt_state, gpt, condition)
        side = _grid_side(gpt_state, config, condition)
    values = {"grid_side": side, "vq": vq_fields, "gpt": gpt_fields}
    return NextPatchConfig.from_dict({**values, "condition": condition.to_dict()})


def _vq_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of VqConfig that follow from shapes."""
    size, width = shape_of(state, _TOKENIZER, 2)
    base = shape_of(state, "encoder.conv_in.weight", 4)[0]
    levels = range(count_of(state, r"encoder\.conv_blocks\.(\d+)\."))
    names = (f"encoder.conv_blocks.{level}.res.0.conv1.weight" for level in levels)
    return {
        "codebook_size": size,
        "codebook_width": width,
        "latent_channels": shape_of(state, "quant_conv.weight", 4)[1],
        "base_channels": base,
        "channel_multipliers": [shape_of(state, name, 4)[0] // base for name in names],
        "num_res_blocks": count_of(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
    }


def _condition(state: Mapping[str, Tensor]) -> ClassCondition | CaptionCondition:
    """Return the condition that the embedding is for."""
    null = "cls_embedding.uncond_embedding"
    if null in state:
        max_tokens, width = shape_of(state, null, 2)
        return CaptionCondition(text_width=width, max_tokens=max_tokens)
    rows = shape_of(state, "cls_embedding.embedding_table.weight", 2)[0]
    if rows < 2:
        raise CheckpointError("there is no class beside the null class in cls_embedding")
    return ClassCondition(num_classes=rows - 1)


def _gpt_fields(
    state: Mapping[str, Tensor],
    given: Mapping[str, Any],
    condition: ClassCondition | CaptionCondition,
) -> dict[str, Any]:
    """Return the fields of GptConfig from shapes and arguments."""
    num_codes, width = shape_of(state, _PREDICTOR, 2)
    depth = count_of(state, r"layers\.(\d+)\.")
    told: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "vocab_size": num_codes,
        "cls_token_num": 1,
        "model_type": "c2i",
    }
    if isinstance(condition, CaptionCondition):
        lengths = {"caption_dim": condition.text_width, "cls_token_num": condition.max_tokens}
        told |= {**lengths, "model_type": "t2i"}
    else:
        told["num_classes"] = condition.num_classes
    found = renamed(given, _GPT_ARGUMENTS, "gpt", told)
    found |= {"width": width, "depth": depth}
    if found.get("num_heads") is None:
        found["num_heads"] = _num_heads(depth, width)
    head = width // integer("--config: gpt.n_head", found["num_heads"], least=1, most=width)
    rows = shape_of(state, "layers.0.attention.wqkv.weight", 2)[0]
    kv_heads = (rows - width) // (2 * head)
    if found.get("num_kv_heads") not in (None, kv_heads):
        raise contradiction("gpt.n_kv_head", found["num_kv_heads"], kv_heads)
    found["num_kv_heads"] = None if kv_heads == found["num_heads"] else kv_heads
    if given.get("multiple_of") is None and given.get("ffn_dim_multiplier") is None:
        hidden, usual = shape_of(state, "layers.0.feed_forward.w1.weight", 2)[0], 8 * width // 3
        if hidden != -(-usual // 256) * 256:
            found["multiple_of"] = hidden
            found["ffn_dim_multiplier"] = hidden / usual if hidden < usual else None
    return found


def _num_heads(depth: int, width: int) -> int:
    """Return the number of heads, which the weights do not show."""
    for size in GPT_SIZES.values():
        if size[:2] == (depth, width):
            return size[2]
    if width % _USUAL_HEAD:
        raise ConfigError(
            "these weights do not show the number of heads; give "
            '{"gpt": {"n_head": H}} with --config'
        )
    return width // _USUAL_HEAD


def _grid_side(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    condition: ClassCondition | CaptionCondition,
) -> int:
    """Return the side of the grid of codes: as given, of an old checkpoint's table, or 16."""
    prefix = condition.max_tokens if isinstance(condition, CaptionCondition) else 1
    told = None
    if _TABLE in state:
        told = math.isqrt(max(shape_of(state, _TABLE, 3)[0] - prefix, 0))
    block = arguments_of(config, "gpt").get("block_size")
    given = None
    if block is not None:
        given = math.isqrt(integer("--config: gpt.block_size", block, least=4))
        if given**2 != block:
            raise ConfigError(f"--config: gpt.block_size={block} is no square of a grid's side")
    for name, value in (("grid", config.get("grid")), ("gpt.block_size", given)):
        if value is not None and told not in (None, value):
            raise contradiction(name, value if name == "grid" else block, told)
        told = told if value is None else integer(f"--config: {name}", value, least=2)
    if told is None:
        logger.warning(
            "the weights do not show the grid of codes: %d codes a side are assumed; for others "
            'give {"grid": SIDE} with --config',
            _DEFAULT_SIDE,
        )
    return _DEFAULT_SIDE if told is None else told


def with_our_names(
    module: VqTokenizer, state: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Return a published tokenizer's state dict for `module`; errors have the published names."""
    levels = len(module.config.channel_multipliers)
    own = {n: t for n, t in module.state_dict().items() if n != "quantize.usage_V"}
    theirs = {name: _published_names(name, levels) for name in own}
    wanted = {
        their: part
        for name, names in theirs.items()
        for their, part in zip(names, own[name].chunk(len(names)), strict=True)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    compare_shapes(wanted, shapes, source, optional=(_USED,))
    found = {name: joined(state, names, source) for name, names in theirs.items()}
    return {**found, "quantize.usage_V": torch.zeros(module.config.codebook_size)}


def _published_names(ours: str, levels: int) -> tuple[str, ...]:
    """Return the tensors of a published tokenizer that are one of ours.

    Its decoder counts levels from the coarsest one, and its attention has three projections.
    """
    name = re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", ours)
    name = re.sub(
        r"^decoder\.up\.(\d+)", lambda at: f"decoder.conv_blocks.{levels - 1 - int(at[1])}", name
    )
    name = name.replace(".block.", ".res.")
    for place, ours_in_the_middle in enumerate(("block_1", "attn_1", "block_2")):
        name = name.replace(f".mid.{ours_in_the_middle}.", f".mid.{place}.")
    before, found, after = name.partition(".qkv.")
    return tuple(f"{before}.{each}.{after}" for each in _QKV) if found else (name,)
