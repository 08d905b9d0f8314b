"""Builds the model of a checkpoint folder from its parts (torch)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nsp.family.contract import AnyFamily
from nsp.family.system import System
from nsp.text.any_encoder import load_text_model
from nsp.text.tokenizer import PromptTokenizer
from nsp.weights.module_weights import bounded_by_files, load_weights
from nsp.weights.weight_files import listed_in


def load_system(
    folder: Path,
    record: AnyFamily,
    config: Mapping[str, Any],
    listed: Collection[str] | None = None,
) -> System:
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
        encoder = load_text_model(folder / "text_encoder", listed=listed_in(listed, "text_encoder"))
    with bounded_by_files(folder, learner.parts, listed):
        system: System = learner.build(model, text_encoder=encoder, prompt_tokenizer=tokenizer)
    for part in learner.parts:
        load_weights(system.get_submodule(part), folder / part)
    return system.eval()
