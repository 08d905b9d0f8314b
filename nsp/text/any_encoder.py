"""Text encoders of every kind: the one in a checkpoint folder."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from nsp.errors import CheckpointError
from nsp.text.encoder import load_text_encoder
from nsp.text.t5 import T5_MODEL_TYPE, load_t5
from nsp.weights.weight_files import read_settings

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

    TextModel: TypeAlias = CLIPTextModel | T5EncoderModel


def load_text_model(folder: Path, *, listed: Collection[str] | None = None) -> "TextModel":
    """Return the text encoder of the kind that the folder's config.json names.

    Raises CheckpointError like `load_text_encoder`.
    """
    try:
        kind = read_settings(folder / "config.json").get("model_type")
    except CheckpointError:
        kind = None  # the loader says what is wrong
    load = load_t5 if kind == T5_MODEL_TYPE else load_text_encoder
    model: TextModel = load(folder, listed=listed)
    return model
