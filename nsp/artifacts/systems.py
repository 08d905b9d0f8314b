"""Models of any family written to checkpoint folders and read from them (torch).

config.json      {"family": "var", "config": {...}, ...}
PART/            model.safetensors, for every part the family names ("predictor", "vae")
text_encoder/    a CLIPTextModel folder       (models that read prompts)
tokenizer/       its prompt tokenizer
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nsp.artifacts.checkpoint import ConfigFile, write_checkpoint
from nsp.family.contract import AnyFamily
from nsp.family.registry import family
from nsp.family.system import System
from nsp.text.encoder import load_text_encoder, save_text_encoder
from nsp.text.tokenizer import PromptTokenizer
from nsp.weights.module_weights import bounded_by_files, load_weights, save_weights
from nsp.weights.weight_files import listed_in


def save_checkpoint(
    folder: Path,
    system: System[Any],
    *,
    notes: Mapping[str, Any],
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write `system` to `folder`, replacing what is there only once everything is on disk.

    `notes` (JSON-ready) say where the weights come from; `sampling` are settings that suit this
    model. Both are kept in config.json.
    """
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


def load_system(
    folder: Path,
    record: AnyFamily,
    config: Mapping[str, Any],
    listed: Collection[str] | None = None,
) -> System[Any]:
    """Return the model in `folder`, in float32 and eval mode; `config` is config.json's "config".

    With `listed` only files of those names are read. Raises CheckpointError naming a missing,
    extra, misshapen or non-finite tensor.
    """
    model, learner = record.config.from_dict(config), record.learner
    encoder, tokenizer = None, None
    if record.condition(model) == "prompt":
        tokenizer = PromptTokenizer.load(
            folder / "tokenizer", listed=listed_in(listed, "tokenizer")
        )
        encoder = load_text_encoder(
            folder / "text_encoder", listed=listed_in(listed, "text_encoder")
        )
    with bounded_by_files(folder, learner.parts, listed):
        system: System[Any] = learner.build(model, text_encoder=encoder, prompt_tokenizer=tokenizer)
    for part in learner.parts:
        load_weights(system.get_submodule(part), folder / part)
    return system.eval()
