"""All trainable parts of one `inl_diffusion` model together, as in checkpoints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from nsp.errors import ConfigError
from nsp.families.inl_diffusion.config import InlConfig
from nsp.families.inl_diffusion.model import InlDit
from nsp.families.inl_diffusion.vae import Vae
from nsp.family.system import System
from nsp.text.encoder import check_text_parts
from nsp.text.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel

    from nsp.text.encoder import TextModel


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
        elif (text_encoder.config.d_model, prompt_tokenizer.max_tokens) != (width, length):
            raise ConfigError(
                f"text encoder of width {text_encoder.config.d_model} with "
                f"{prompt_tokenizer.max_tokens} tokens does not fit the transformer, which reads "
                f"{length} states of width {width}"
            )
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
