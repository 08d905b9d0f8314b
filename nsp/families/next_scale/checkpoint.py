"""Checkpoint folders of the family `next_scale`.

config.json      {"family": "next_scale", "config": NextScaleConfig, ...}
generator/       model.safetensors
vae/             model.safetensors
text_encoder/    a CLIPTextModel folder
tokenizer/       its prompt tokenizer
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nsp.artifacts.checkpoint import ConfigFile, write_checkpoint
from nsp.errors import CheckpointError
from nsp.families.next_scale.config import NextScaleConfig
from nsp.families.next_scale.system import NextScaleSystem
from nsp.text.encoder import load_text_encoder, save_text_encoder
from nsp.text.tokenizer import PromptTokenizer
from nsp.weights.module_weights import bounded_by_files, load_weights, save_weights
from nsp.weights.weight_files import listed_in

_MAX_LATENT_SIDE = 2**9  # tables of positions have its square; 4,096 px with 8 px per cell


def save_checkpoint(
    folder: Path,
    system: NextScaleSystem,
    *,
    notes: Mapping[str, Any],
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write `system` to `folder`, replacing what is there only once everything is on disk.

    `notes` (JSON-ready) say where the weights come from; `sampling` are SamplingConfig fields that
    suit this model. Both are kept in config.json.
    """
    about = ConfigFile(
        family="next_scale",
        config=system.config.to_dict(),
        sampling=dict(sampling or {}),
        notes=dict(notes),
    )
    with write_checkpoint(folder, about) as partial:
        save_weights(system.generator, partial / "generator")
        save_weights(system.vae, partial / "vae")
        save_text_encoder(system.text_encoder, partial / "text_encoder")
        system.prompt_tokenizer.save(partial / "tokenizer")


def load_checkpoint(
    folder: Path, config: Mapping[str, Any], listed: Collection[str] | None = None
) -> NextScaleSystem:
    """Return the model in `folder`, in float32 and eval mode; `config` is config.json's "config".

    With `listed` only files of those names are read. Raises CheckpointError naming a missing,
    extra, misshapen or non-finite tensor.
    """
    model = NextScaleConfig.from_dict(config)
    if model.latent_side > _MAX_LATENT_SIDE:
        raise CheckpointError(
            f"{folder}: target_size={model.target_size} makes latents of {model.latent_side} cells "
            f"a side; at most {_MAX_LATENT_SIDE} are loaded"
        )
    encoder = load_text_encoder(folder / "text_encoder", listed=listed_in(listed, "text_encoder"))
    tokenizer = PromptTokenizer.load(folder / "tokenizer", listed=listed_in(listed, "tokenizer"))
    with bounded_by_files(folder, ("generator", "vae"), listed):
        system = NextScaleSystem(model, text_encoder=encoder, prompt_tokenizer=tokenizer)
    load_weights(system.generator, folder / "generator")
    load_weights(system.vae, folder / "vae")
    return system.eval()
