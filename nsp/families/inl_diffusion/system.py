"""All trainable parts of one `inl_diffusion` model together, as in checkpoints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from nsp.errors import ConfigError
from nsp.families.inl_diffusion.config import InlConfig, TextKind
from nsp.families.inl_diffusion.model import InlDit
from nsp.families.inl_diffusion.vae import Vae
from nsp.family.system import System
from nsp.text.encoder import check_text_parts
from nsp.text.plain_folder import check_plain_parts
from nsp.text.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel

    from nsp.text.encoder import TextModel
    from nsp.text.plain import PlainTextModel

_WIDTHS: dict[TextKind, str] = {"clip": "hidden_size", "t5": "d_model", "plain": "width"}


def text_width(kind: TextKind, encoder: "TextModel") -> int:
    """Return the width of a text encoder's states; ConfigError for one of another kind."""
    width: int | None = getattr(encoder.config, _WIDTHS[kind], None)
    if width is None:
        raise ConfigError(
            f"the text encoder is of type {encoder.config.model_type!r}, but the model reads "
            f"prompts with an encoder of kind {kind}"
        )
    return width


class InlSystem(System):
    """Autoencoder, transformer, text encoder and its prompt tokenizer."""

    family: ClassVar[str] = "inl_diffusion"
    config: InlConfig
    text_encoder: "TextModel"

    def __init__(
        self,
        config: InlConfig,
        *,
        text_encoder: "TextModel",
        prompt_tokenizer: PromptTokenizer,
    ) -> None:
        super().__init__(config, text_encoder, prompt_tokenizer)
        width, length = config.dit.context_width, config.dit.context_length
        if config.text == "clip":
            check_text_parts(
                cast("CLIPTextModel", text_encoder),
                prompt_tokenizer,
                text_width=width,
                max_tokens=length,
            )
        found = (text_width(config.text, text_encoder), prompt_tokenizer.max_tokens)
        if found != (width, length):
            raise ConfigError(
                f"text encoder of width {found[0]} with {found[1]} tokens does not fit the "
                f"transformer, which reads {length} states of width {width}"
            )
        if config.text == "plain":
            check_plain_parts(cast("PlainTextModel", text_encoder), prompt_tokenizer)
        self.vae, self.dit = Vae(config.vae), InlDit(config)

    def units(self) -> Sequence[nn.Module]:
        """Return the repeated parts of the transformer."""
        return [*self.dit.blocks]

    def context(self, token_ids_BT: Tensor, dropped_B: Tensor) -> Tensor:
        """Return text states (B, T, W); rows where `dropped_B` holds have the null condition."""
        from nsp.families.inl_diffusion.modules import text_stage

        feeds = [token_ids_BT]
        if self.config.text == "t5":
            assert self.prompt_tokenizer is not None
            feeds.append((token_ids_BT != self.prompt_tokenizer.pad_id).long())
        states: Tensor = text_stage(self)(*feeds)[0]
        if self.config.null_condition == "empty_prompt":
            return states  # prompts that are dropped were made empty before
        return torch.where(dropped_B[:, None, None], self.dit.null_embedding, states)
