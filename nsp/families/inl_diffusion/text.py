"""Which encoder reads the prompts: its width, its stage, and what it must fit."""

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from nsp.errors import ConfigError
from nsp.families.inl_diffusion.config import InlConfig, TextKind
from nsp.text.clip_pair_folder import ClipPairStage, check_clip_pair
from nsp.text.encoder import TextEncoderStage, check_text_parts
from nsp.text.plain_folder import check_plain_parts
from nsp.text.t5 import T5Stage
from nsp.text.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

    from nsp.text.clip_pair import ClipPair
    from nsp.text.encoder import TextModel
    from nsp.text.plain import PlainTextModel

_WIDTHS: dict[TextKind, str] = {
    "clip": "hidden_size",
    "t5": "d_model",
    "plain": "width",
    "clip_pair": "width",
}


def text_stage(kind: TextKind, encoder: "TextModel") -> nn.Module:
    """Return the stage that reads prompts."""
    match kind:
        case "clip":
            return ClipStates(cast("CLIPTextModel", encoder))
        case "t5":
            return T5Stage(cast("T5EncoderModel", encoder))
        case "clip_pair":
            return ClipPairStage(cast("ClipPair", encoder))
        case "plain":
            return encoder


class ClipStates(nn.Module):
    """Prompts -> CLIP's states; what it pools is not used."""

    def __init__(self, model: "CLIPTextModel") -> None:
        super().__init__()
        self.encoder = TextEncoderStage(model)

    def forward(self, token_ids_NT: Tensor) -> tuple[Tensor]:
        """Return text_states."""
        return (self.encoder(token_ids_NT)[0],)


def text_width(kind: TextKind, encoder: "TextModel") -> int:
    """Return the width of a text encoder's states; ConfigError for one of another kind."""
    width: int | None = getattr(encoder.config, _WIDTHS[kind], None)
    if width is None:
        raise ConfigError(
            f"the text encoder is of type {encoder.config.model_type!r}, but the model reads "
            f"prompts with an encoder of kind {kind}"
        )
    return width


def pooled_width(kind: TextKind, encoder: "TextModel") -> int:
    """Return the width of the summaries that the encoder makes beside its states; 0 for none."""
    return cast("ClipPair", encoder).config.pooled_width if kind == "clip_pair" else 0


def check_fit(config: InlConfig, encoder: "TextModel", tokenizer: PromptTokenizer) -> None:
    """Raise ConfigError if transformer, text encoder and tokenizer do not belong together."""
    width, length = config.dit.context_width, config.dit.context_length
    if config.text == "clip":
        check_text_parts(
            cast("CLIPTextModel", encoder), tokenizer, text_width=width, max_tokens=length
        )
    found = (text_width(config.text, encoder), tokenizer.max_tokens)
    if found != (width, length):
        raise ConfigError(
            f"text encoder of width {found[0]} with {found[1]} tokens does not fit the "
            f"transformer, which reads {length} states of width {width}"
        )
    summary = pooled_width(config.text, encoder)
    if summary != config.dit.pooled_width:
        raise ConfigError(
            f"the text encoder makes summaries of width {summary}, but the transformer reads such "
            f"of width {config.dit.pooled_width}"
        )
    if config.text == "clip_pair":
        check_clip_pair(cast("ClipPair", encoder), tokenizer)
    if config.text == "plain":
        check_plain_parts(cast("PlainTextModel", encoder), tokenizer)
