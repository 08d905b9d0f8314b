"""Writes models of any family to checkpoint folders (torch); model_parts.py reads them.

config.json      {"family": ..., "config": {...}, ...}
PART/            model.safetensors, for every part the family names ("predictor", "vae")
text_encoder/    CLIP, T5 or a plain encoder (models that read prompts)
tokenizer/       its prompt tokenizer
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsp.artifacts.checkpoint import ConfigFile, write_checkpoint
from nsp.family.registry import family
from nsp.family.system import System
from nsp.text.encoder import save_text_encoder
from nsp.weights.module_weights import save_weights


def save_checkpoint(
    folder: Path,
    system: System,
    *,
    notes: Mapping[str, Any],
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write `system` to `folder`; existing content is replaced only when everything is on disk.

    `notes` (JSON-ready) say where the weights come from; `sampling` are settings that suit this
    model. Both are kept in config.json.
    """
    system.settle()
    about = ConfigFile(
        family=system.family,
        config=system.config.to_dict(),
        sampling=dict(sampling or {}),
        notes=dict(notes),
    )
    with write_checkpoint(folder, about) as partial:
        for part in family(system.family).learner.parts:
            save_weights(system.get_submodule(part), partial / part)
        if system.text_encoder is not None and system.prompt_tokenizer is not None:
            save_text_encoder(system.text_encoder, partial / "text_encoder")
            system.prompt_tokenizer.save(partial / "tokenizer")
