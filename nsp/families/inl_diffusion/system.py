"""All trainable parts of one `inl_diffusion` model together, as in checkpoints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from nsp.families.inl_diffusion.config import InlConfig
from nsp.families.inl_diffusion.model import InlDit
from nsp.families.inl_diffusion.text import check_fit, text_stage
from nsp.families.inl_diffusion.vae import Vae
from nsp.family.system import System
from nsp.text.tokenizer import PromptTokenizer

if TYPE_CHECKING:
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
        check_fit(config, text_encoder, prompt_tokenizer)
        self.vae, self.dit = Vae(config.vae), InlDit(config)

    def units(self) -> Sequence[nn.Module]:
        """Return the repeated parts of the transformer."""
        return [*self.dit.blocks]

    def context(self, token_ids_BT: Tensor, dropped_B: Tensor) -> Tensor:
        """Return text states (B, T, W); rows where `dropped_B` holds have the null condition."""
        feeds = [token_ids_BT]
        if self.config.text == "t5":
            assert self.prompt_tokenizer is not None
            feeds.append((token_ids_BT != self.prompt_tokenizer.pad_id).long())
        states: Tensor = text_stage(self.config.text, self.text_encoder)(*feeds)[0]
        if self.config.null_condition == "empty_prompt":
            return states  # prompts that are dropped were made empty before
        return torch.where(dropped_B[:, None, None], self.dit.null_embedding, states)
