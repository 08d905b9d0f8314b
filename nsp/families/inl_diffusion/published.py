"""Reads published weights of INL-Diffusion: autoencoder and transformer in, a checkpoint out.

Values that follow from shapes are inferred; the others come from the constructor arguments of the
public code. A published model was trained with scaled-linear noise, and sampled with the encoded ""
as its null condition. Its text encoder was not saved with it, so that it is given beside it. Source
of names: github.com/Web3-League/inl-diffusion, inl_diffusion/models/inl_dit.py, inl_diffusion/vae.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsp.artifacts.checkpoint import check_new_checkpoint
from nsp.artifacts.systems import save_checkpoint
from nsp.diffusion.noise import Noise
from nsp.errors import CheckpointError, ConfigError
from nsp.families.inl_diffusion.config import (
    PUBLIC_NOISE,
    SIZES,
    InlConfig,
    Integrator,
    TextKind,
    VaeConfig,
)
from nsp.families.inl_diffusion.system import InlSystem
from nsp.text.parts import TextEncoderSettings, text_parts
from nsp.text.plain import PLAIN_MODEL_TYPE, PlainTextConfig, PlainTextModel
from nsp.text.plain_folder import plain_parts
from nsp.text.t5 import T5_MODEL_TYPE, pretrained_t5
from nsp.text.tokenizer import PromptTokenizer
from nsp.values import integer
from nsp.weights.arguments import arguments_of, check_parts, contradiction, naming, renamed
from nsp.weights.module_weights import bounded, load_state
from nsp.weights.state_names import count_of, find_state, shape_of, what_it_is
from nsp.weights.weight_files import read_settings, read_tensor_file

if TYPE_CHECKING:
    from nsp.text.encoder import TextModel

# Constructor argument of the public code -> our field; None: nothing here depends on it.
_VAE_ARGUMENTS = {
    "base_channels": "base_channels",
    "channel_mult": "channel_multipliers",
    "num_res_blocks": "num_res_blocks",
    "latent_dim": "latent_channels",
    **dict.fromkeys(("image_size", "in_channels", "use_attention")),
}
_DIT_ARGUMENTS = {
    "d_model": "width",
    "num_layers": "depth",
    "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "patch_size": "patch_size",
    "context_dim": "context_width",
    "dropout": "dropout",
    "num_integrator_iterations": "num_iterations",
    "num_experts": "num_experts",
    "moe_top_k": "num_active_experts",
    **dict.fromkeys(("img_size", "in_channels", "mlp_ratio", "use_moe", "use_learned_null")),
}
_TEXT_ARGUMENTS = {
    "vocab_size": "vocab_size",
    "d_model": "width",
    "num_layers": "depth",
    "max_length": "max_tokens",
    "num_heads": "num_heads",
}
_PARTS = ("vae", "dit", "text_encoder", "noise")
_VAE, _DIT = "encoder.mid_block1.conv1.weight", "t_embed.mlp.0.weight"  # all models have these
_TEXT = "pos_embedding"
_RATES = "rope.inv_freq"  # computed here
_STATISTICS = re.compile(r".*\.(expert_counts|total_tokens)")  # of training, in mixtures
_NULL = "null_embedding"
_DEFAULT_SIDE = 32  # 256 px at a downsampling of 8
_DEFAULT_LENGTH = 77
_USUAL_HEAD = 64
_RATE_BASE, _RATE_TOLERANCE = 10_000.0, 1e-2  # relative; files in half precision are read, too
logger = logging.getLogger(__name__)
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """The weights of one published file."""

    path: Path
    state: State


@dataclass(frozen=True)
class TextParts:
    """What reads the prompts."""

    kind: TextKind
    tokenizer: PromptTokenizer
    encoder: "TextModel"


def convert(
    files: Mapping[str, Path], config: Mapping[str, Any] | None, output_dir: Path
) -> InlConfig:
    """Write the checkpoint folder `output_dir` from published weights; return its configuration.

    `files` has "tokenizer" (the autoencoder), "predictor" and "text-encoder". `config` may hold
    constructor arguments under "vae", "dit" and "text_encoder", and fields of our `Noise` under
    "noise". Raises CheckpointError naming a file that holds something else, or a missing, extra,
    misshapen or non-finite tensor; ConfigError for an argument that is unknown or contradicts the
    tensors.
    """
    check_new_checkpoint(output_dir)
    vae, dit = read_vae(files["tokenizer"]), read_dit(files["predictor"])
    system = assembled(vae, dit, files.get("text-encoder"), config or {})
    names = {name: path.name for name, path in files.items()}
    save_checkpoint(output_dir, system, notes={"converted_from": names})
    return system.config


def read_vae(path: Path) -> Part:
    """Return the weights of an autoencoder; CheckpointError for a file of something else."""
    return Part(path, _read(path, "autoencoder", "tokenizer", _VAE))


def read_dit(path: Path) -> Part:
    """Return the weights of a transformer; CheckpointError for a file of something else."""
    return Part(path, _read(path, "transformer", "predictor", _DIT))


def _read(path: Path, words: str, option: str, mark: str) -> dict[str, Tensor]:
    state = find_state(read_tensor_file(path), path)
    if mark in state:
        return state
    others = {_VAE: ("autoencoder", "tokenizer"), _DIT: ("transformer", "predictor")}
    for other, (held, its_option) in others.items():
        if other in state:
            raise CheckpointError(
                f"{path} holds the {held} of INL-Diffusion; give it with --{its_option}, and its "
                f"{words} with --{option}"
            )
    raise CheckpointError(
        f"{path} {what_it_is(path, state)}; give the {words} of INL-Diffusion (missing tensor "
        f"{mark})"
    )


def assembled(
    vae: Part, dit: Part, text_encoder: Path | None, config: Mapping[str, Any]
) -> InlSystem:
    """Return the model of published weights, in eval mode; arguments and errors as `convert`."""
    model = infer_config(vae, dit, config)
    if text_encoder is None:
        raise ConfigError(
            "published models of INL-Diffusion have no text encoder in them; give the one that "
            f"{dit.path.name} was trained with by --text-encoder: a CLIP or T5 folder, or the "
            "file of its own encoder with tokenizer.json beside it"
        )
    text = read_text(text_encoder, model.dit.context_length, arguments_of(config, "text_encoder"))
    model = InlConfig.from_dict({**model.to_dict(), "text": text.kind})
    shapes = [tensor.shape for part in (vae, dit) for tensor in part.state.values()]
    with bounded(shapes, f"{vae.path.name} and {dit.path.name}"):
        system = InlSystem(model, text_encoder=text.encoder, prompt_tokenizer=text.tokenizer)
    load_state(system.vae, vae.state, str(vae.path))
    load_state(system.dit, _own_weights(dit.state, model), str(dit.path))
    return system.eval()


def _own_weights(state: State, config: InlConfig) -> dict[str, Tensor]:
    """Return the transformer's weights without what is computed or counted; null at least zero."""
    found = {n: t for n, t in state.items() if n != _RATES and not _STATISTICS.fullmatch(n)}
    dit = config.dit  # models of the documented form have no learned null condition
    found.setdefault(_NULL, torch.zeros(1, dit.context_length, dit.context_width))
    return found


def infer_config(vae: Part, dit: Part, config: Mapping[str, Any]) -> InlConfig:
    """Return the configuration from shapes and, for other values, from the given arguments.

    Errors are as in `convert`.
    """
    check_parts(config, _PARTS)
    vae_given, dit_given = arguments_of(config, "vae"), arguments_of(config, "dit")
    text_given = arguments_of(config, "text_encoder")
    with naming(vae.path):
        told = _vae_fields(vae.state)
    read = {name: _as_list(value) for name, value in vae_given.items()}
    vae_fields = told | renamed(read, _VAE_ARGUMENTS, "vae", told)
    length = text_given.get("max_length") or _DEFAULT_LENGTH
    with naming(dit.path):
        channels = shape_of(dit.state, "patch_embed.proj.weight", 4)[1]
        if channels != told["latent_channels"]:
            raise CheckpointError(
                f"the transformer reads latents of {channels} channels, but {vae.path} makes "
                f"{told['latent_channels']}; give the autoencoder that it was trained with"
            )
        dit_fields = _dit_fields(dit.state, dit_given, length)
    side = _latent_side(vae_given, dit_given, VaeConfig.from_dict(vae_fields).downsampling)
    noise = Noise.from_dict({**PUBLIC_NOISE.to_dict(), **arguments_of(config, "noise")})
    return InlConfig.from_dict(
        {
            "latent_side": side,
            "vae": vae_fields,
            "dit": dit_fields,
            "noise": noise.to_dict(),
            "null_condition": "empty_prompt",
        }
    )


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _vae_fields(state: State) -> dict[str, Any]:
    """Return the fields of VaeConfig that follow from shapes."""
    base = shape_of(state, "encoder.conv_in.weight", 4)[0]
    widths: list[list[int]] = [[]]  # of the residual blocks, by level
    for index in range(count_of(state, r"encoder\.down_blocks\.(\d+)\.")):
        name = f"encoder.down_blocks.{index}"
        if f"{name}.conv.weight" in state:  # the end of a level
            widths.append([])
        elif f"{name}.qkv.weight" not in state:
            widths[-1].append(shape_of(state, f"{name}.conv1.weight", 4)[0])
    if not all(widths):
        raise CheckpointError("a level of the autoencoder has no residual block")
    return {
        "base_channels": base,
        "channel_multipliers": [level[0] // base for level in widths],
        "num_res_blocks": len(widths[0]),
        "latent_channels": shape_of(state, "encoder.conv_out.weight", 4)[0] // 2,
        "latent_scale": _latent_scale(state),
    }


def _latent_scale(state: State) -> float:
    """Return the factor of the latents; the usual one if the file has that in half precision."""
    if "latent_scale" not in state:
        return VaeConfig.latent_scale
    kept = state["latent_scale"]
    if kept.numel() != 1 or not bool(torch.isfinite(kept.float()).all()):
        raise CheckpointError("tensor latent_scale is not one finite number")
    usual = torch.tensor(VaeConfig.latent_scale).to(kept.dtype)
    return VaeConfig.latent_scale if bool((kept == usual).all()) else float(kept)


def _dit_fields(state: State, given: Mapping[str, Any], length: object) -> dict[str, Any]:
    """Return the fields of DitConfig from shapes and arguments."""
    width, channels, patch_size = shape_of(state, "patch_embed.proj.weight", 4)[:3]
    integrator = _integrator(state)
    told: dict[str, Any] = {
        "width": width,
        "depth": count_of(state, r"blocks\.(\d+)\."),
        "patch_size": patch_size,
        "context_width": shape_of(state, "blocks.0.norm_context.weight", 1)[0],
        "in_channels": channels,
        "use_moe": integrator == "mixture",
    }
    if _NULL in state:
        length = shape_of(state, _NULL, 3)[1]
    if integrator == "mixture":
        told["num_experts"] = shape_of(state, "blocks.0.integrator.expert_w1", 3)[0]
    found = told | renamed(given, _DIT_ARGUMENTS, "dit", told)
    found = {name: each for name, each in found.items() if name in _DIT_ARGUMENTS.values()}
    rows = shape_of(state, "blocks.0.mlp.fc1.weight", 2)[0]
    ratio = given.get("mlp_ratio")
    if ratio is not None and int(width * ratio) != rows:
        raise contradiction("dit.mlp_ratio", ratio, rows / width)
    return {
        **found,
        **_heads(state, found),
        "mlp_ratio": rows / width if int(rows / width * width) == rows else (rows + 0.5) / width,
        "integrator": integrator,
        "context_length": length,
    }


def _integrator(state: State) -> Integrator:
    """Return the form of the integrator neurons: each has tensors that the others lack."""
    prefix = "blocks.0.integrator"
    if f"{prefix}.expert_w1" in state:
        return "mixture"
    if f"{prefix}.controller.0.weight" in state:
        return "controlled"
    if shape_of(state, f"{prefix}.integration_weight", 1)[0] == 1:
        return "scalar"
    raise CheckpointError(f"missing tensor {prefix}.controller.0.weight")


def _heads(state: State, found: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of heads: by the rotations of old files, by size, or of 64 channels."""
    width, given = found["width"], found.get("num_heads")
    heads = given and integer("--config: dit.num_heads", given, least=1, most=width)
    if _RATES in state:
        count = shape_of(state, _RATES, 1)[0]
        _check_rates(state[_RATES])
        if heads and width // heads != 4 * count:
            raise contradiction("dit.num_heads", heads, width // (4 * count))
        heads = width // (4 * count)
    if not heads:
        sizes = {(each.dit.width, each.dit.depth): each.dit.num_heads for each in SIZES.values()}
        heads = sizes.get((width, found["depth"])) or width // _USUAL_HEAD
    rows = shape_of(state, "blocks.0.attn.k_proj.weight", 2)[0]
    if not heads or width % heads or rows % (width // heads):
        raise ConfigError(
            "these weights do not show the number of heads; give "
            '{"dit": {"num_heads": H}} with --config'
        )
    kv_heads = rows // (width // heads)
    if found.get("num_kv_heads") not in (None, kv_heads):
        raise contradiction("dit.num_kv_heads", found["num_kv_heads"], kv_heads)
    return {"num_heads": heads, "num_kv_heads": kv_heads}


def _check_rates(rates: Tensor) -> None:
    """Raise CheckpointError for rotations that are not those that we compute."""
    own = _RATE_BASE ** (-torch.arange(len(rates)) / len(rates))
    if not torch.allclose(rates.float(), own, rtol=_RATE_TOLERANCE, atol=1e-6):
        raise CheckpointError(f"tensor {_RATES} has rotations of another kind of model")


def _latent_side(vae: Mapping[str, Any], dit: Mapping[str, Any], downsampling: int) -> int:
    """Return the side of the latents, as given; the weights do not show it."""
    side, pixels = dit.get("img_size"), vae.get("image_size")
    if pixels is not None:
        whole = integer("--config: vae.image_size", pixels, least=downsampling)
        if side not in (None, whole // downsampling):
            raise contradiction("dit.img_size", side, whole // downsampling)
        side = whole // downsampling
    if side is None:
        logger.warning(
            "the weights do not show the size of pictures: %d px are assumed; for others give "
            '{"dit": {"img_size": SIDE_OF_LATENTS}} with --config',
            _DEFAULT_SIDE * downsampling,
        )
        return _DEFAULT_SIDE
    return integer("--config: dit.img_size", side, least=1)


def read_text(path: Path, num_tokens: int, given: Mapping[str, Any]) -> TextParts:
    """Return the text encoder in a folder or a file, with its tokenizer.

    A folder is CLIP's, T5's, or that of a plain encoder; a file has the weights of a plain one, and
    its tokenizer.json lies beside it. `given` are constructor arguments of the latter.
    """
    if not path.is_dir():
        return _plain_file(path, given)
    if given:
        raise ConfigError(f"--config: text_encoder describes a file of weights; {path} is a folder")
    inside = path / "text_encoder"
    settings = (inside if inside.is_dir() else path) / "config.json"
    kind = read_settings(settings).get("model_type") if settings.is_file() else None
    folder = TextEncoderSettings(folder=str(path))
    if kind == T5_MODEL_TYPE:
        return TextParts("t5", *pretrained_t5(path, num_tokens))
    if kind == PLAIN_MODEL_TYPE:
        return TextParts("plain", *plain_parts(folder, 0, num_tokens, None))
    return TextParts("clip", *text_parts(folder, 0, num_tokens, None))


def _plain_file(path: Path, given: Mapping[str, Any]) -> TextParts:
    """Return the plain encoder whose weights are in a file, and the tokenizer beside it."""
    state = find_state(read_tensor_file(path), path)
    if _TEXT not in state:
        raise CheckpointError(
            f"{path} {what_it_is(path, state)}; give the text encoder of INL-Diffusion, or a CLIP "
            f"or T5 folder (missing tensor {_TEXT})"
        )
    with naming(path):
        vocab_size, width = shape_of(state, "embedding.weight", 2)
        told = {
            "vocab_size": vocab_size,
            "width": width,
            "depth": count_of(state, r"encoder\.layers\.(\d+)\."),
            "mlp_width": shape_of(state, "encoder.layers.0.linear1.weight", 2)[0],
            "max_tokens": shape_of(state, _TEXT, 3)[1],
        }
    config = PlainTextConfig.from_dict(told | renamed(given, _TEXT_ARGUMENTS, "text_encoder", told))
    with bounded([tensor.shape for tensor in state.values()], str(path)):
        encoder = PlainTextModel(config)
    load_state(encoder, state, str(path))
    if not (path.parent / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{path.parent} has no tokenizer.json; put the tokenizer that {path.name} was trained "
            "with beside it"
        )
    tokenizer = PromptTokenizer.load(path.parent, max_tokens=config.max_tokens)
    return TextParts("plain", tokenizer, encoder.eval())
