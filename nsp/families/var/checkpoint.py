"""Checkpoint folders of the family `var`.

config.json      {"family": "var", "config": VarConfig, ...}
predictor/       model.safetensors
vae/             model.safetensors
text_encoder/    a CLIPTextModel folder       (text-conditional models)
tokenizer/       its prompt tokenizer
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nsp.artifacts.checkpoint import ConfigFile, write_checkpoint
from nsp.families.var.config import VarConfig
from nsp.families.var.system import VarSystem
from nsp.text.encoder import load_text_encoder, save_text_encoder
from nsp.text.tokenizer import PromptTokenizer
from nsp.weights.module_weights import bounded_by_files, load_weights, save_weights
from nsp.weights.weight_files import listed_in


def save_checkpoint(
    folder: Path,
    system: VarSystem,
    *,
    notes: Mapping[str, Any],
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write `system` to `folder`, replacing what is there only once everything is on disk.

    `notes` (JSON-ready) say where the weights come from; `sampling` are SamplingConfig fields that
    suit this model. Both are kept in config.json.
    """
    about = ConfigFile(
        family="var",
        config=system.config.to_dict(),
        sampling=dict(sampling or {}),
        notes=dict(notes),
    )
    with write_checkpoint(folder, about) as partial:
        save_weights(system.predictor, partial / "predictor")
        save_weights(system.vae, partial / "vae")
        if system.text_encoder is not None and system.prompt_tokenizer is not None:
            save_text_encoder(system.text_encoder, partial / "text_encoder")
            system.prompt_tokenizer.save(partial / "tokenizer")


def load_checkpoint(
    folder: Path, config: Mapping[str, Any], listed: Collection[str] | None = None
) -> VarSystem:
    """Return the model in `folder`, in float32 and eval mode; `config` is config.json's "config".

    With `listed` only files of those names are read. Raises CheckpointError naming a missing,
    extra, misshapen or non-finite tensor.
    """
    var_config = VarConfig.from_dict(config)
    encoder, tokenizer = None, None
    if var_config.text is not None:
        tokenizer = PromptTokenizer.load(
            folder / "tokenizer", listed=listed_in(listed, "tokenizer")
        )
        encoder = load_text_encoder(
            folder / "text_encoder", listed=listed_in(listed, "text_encoder")
        )
    with bounded_by_files(folder, ("predictor", "vae"), listed):
        system = VarSystem(var_config, text_encoder=encoder, prompt_tokenizer=tokenizer)
    load_weights(system.predictor, folder / "predictor")
    load_weights(system.vae, folder / "vae")
    return system.eval()
