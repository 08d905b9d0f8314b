"""Adapters (LoRA) as files in peft's form, and their merging into a model's weights.

    adapter_model.safetensors   base_model.model.LAYER.lora_A.weight (r, in) and
                                base_model.model.LAYER.lora_B.weight (out, r)
    adapter_config.json         r, lora_alpha and what else peft needs

LAYER is the name of a linear layer in the system, such as `dit.blocks.0.attn.q_proj`; its merged
weight is W + lora_alpha / r * B A (Hu et al. 2021, arXiv:2106.09685, section 4.1). The file's
metadata has a digest of the weights that the adapter was trained on.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nsp import values
from nsp.errors import CheckpointError, ConfigError
from nsp.files import write_folder
from nsp.weights.state_names import what_it_is
from nsp.weights.weight_files import (
    read_metadata,
    read_safetensors,
    read_settings,
    write_safetensors,
)

WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_BASE = "nsp_base"  # metadata: digest of the layers' weights
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight"
)
_MOST = 2**20


@dataclass(frozen=True)
class Adapter:
    """What a file adds to linear layers."""

    path: Path
    layers: Mapping[str, tuple[Tensor, Tensor]]  # layer -> A (r, in), B (out, r)
    scaling: float
    base: str | None  # digest of the weights it was trained on, if it is known
    digest: str  # of all that it adds


def save_adapter(
    folder: Path,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    weights: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: int,
) -> None:
    """Write an adapter of layers with these `weights`; peft can read the folder, too."""
    state = {}
    for layer, pair in layers.items():
        for part, tensor in zip("AB", pair, strict=True):
            key = f"{_PREFIX}{layer}.lora_{part}.weight"
            state[key] = tensor.detach().float().cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers),
        "bias": "none",
        "inference_mode": True,
    }
    with write_folder(folder) as partial:
        about = {"format": "pt", _BASE: _base_digest(weights)}
        write_safetensors(state, partial / WEIGHTS_NAME, metadata=about)
        (partial / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n")


def read_adapter(path: Path) -> Adapter:
    """Return the adapter in a folder, or in a file with its configuration beside it.

    Raises CheckpointError for what is none, and for kinds of adapters that change more than linear
    layers.
    """
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise CheckpointError(
            f"{path} has no {WEIGHTS_NAME}: it is not the folder of an adapter (lora)"
        )
    state = read_safetensors(file)
    config = read_settings(file.parent / CONFIG_NAME)
    if config.get("use_dora") or config.get("use_rslora") or config.get("fan_in_fan_out"):
        raise CheckpointError(f"{file} is not a plain LoRA (DoRA, rsLoRA, transposed layers)")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise CheckpointError(f"{file} has ranks or factors of single layers, which are not read")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = _KEY.fullmatch(name)
        if found is None:
            said = what_it_is(file, state)
            raise CheckpointError(f"{file} {said}; {name} is not a weight of a LoRA")
        pairs.setdefault(found["layer"], {})[found["part"]] = tensor.float()
    if not pairs or any(len(pair) != 2 for pair in pairs.values()):
        raise CheckpointError(f"{file} has not both halves (lora_A, lora_B) of every layer")
    try:
        rank = values.integer("r", config.get("r"), least=1, most=_MOST)
        alpha = values.real("lora_alpha", config.get("lora_alpha"), least=0, most=_MOST)
    except ConfigError as error:
        raise CheckpointError(f"{file.parent / CONFIG_NAME}: {error}") from error
    layers = {layer: (pair["A"], pair["B"]) for layer, pair in pairs.items()}
    digest = hashlib.sha256(f"{alpha / rank}".encode())
    _update(digest, state.items())
    base = read_metadata(file).get(_BASE)
    return Adapter(path, layers, alpha / rank, base, digest.hexdigest())


@torch.no_grad()
def merge_adapter(system: nn.Module, adapter: Adapter) -> None:
    """Add an adapter to the weights of `system`; CheckpointError if it is of another model."""
    linear = {n: each for n, each in system.named_modules() if isinstance(each, nn.Linear)}
    other = f"{adapter.path} is a LoRA of another model"
    for layer, (a, b) in adapter.layers.items():
        if layer not in linear:
            raise CheckpointError(f"{other}: this one has no linear layer {layer}")
        wanted, ranks = tuple(linear[layer].weight.shape), (b.shape[1], a.shape[0])
        if (b.shape[0], a.shape[1]) != wanted or ranks[0] != ranks[1]:
            raise CheckpointError(
                f"{other}: {layer} is {wanted[0]} x {wanted[1]}, but it changes "
                f"{b.shape[0]} x {a.shape[1]}"
            )
    weights = {layer: linear[layer].weight for layer in adapter.layers}
    if adapter.base not in (None, _base_digest(weights)):
        raise CheckpointError(
            f"{other}: it was trained on other weights of the same shape; give the checkpoint that "
            "its run started from"
        )
    for layer, (a, b) in adapter.layers.items():
        weight = linear[layer].weight
        weight += (adapter.scaling * (b @ a)).to(weight)


def _base_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a digest of weights that is the same for a copy of the model in float16."""
    digest = hashlib.sha256()
    _update(digest, ((name, tensor.half()) for name, tensor in weights.items()))
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in sorted(tensors, key=lambda each: each[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
