"""Builds the model of a checkpoint folder from its parts (torch)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.errors import CheckpointError
from nsp.family.contract import AnyFamily
from nsp.family.system import System
from nsp.text.clip_pair import CLIP_PAIR_TYPE
from nsp.text.clip_pair_folder import load_clip_pair
from nsp.text.encoder import load_text_encoder
from nsp.text.plain import PLAIN_MODEL_TYPE
from nsp.text.plain_folder import load_plain
from nsp.text.tokenizer import PromptTokenizer
from nsp.weights.module_weights import bounded_by_files, load_weights
from nsp.weights.weight_files import listed_in, read_settings

if TYPE_CHECKING:
    from nsp.text.encoder import TextModel


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


def load_text_model(folder: Path, *, listed: Collection[str] | None = None) -> "TextModel":
    """Return the text encoder in a folder, of the kind that its config.json names.

    Raises CheckpointError like `load_text_encoder`.
    """
    try:
        kind = read_settings(folder / "config.json").get("model_type")
    except CheckpointError:
        kind = None  # the loader says what is wrong
    if kind == "t5":
        from nsp.text.t5 import load_t5

        return load_t5(folder, listed=listed)
    if kind == CLIP_PAIR_TYPE:
        return load_clip_pair(folder, listed=listed)
    if kind == PLAIN_MODEL_TYPE:
        return load_plain(folder, listed=listed)
    return load_text_encoder(folder, listed=listed)
