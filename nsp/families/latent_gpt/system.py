"""All trainable parts of one `latent_gpt` model together, as in checkpoints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from nsp.errors import ConfigError
from nsp.families.latent_gpt.config import LatentGptConfig
from nsp.families.latent_gpt.model import Gpt
from nsp.raster.raster_system import RasterSystem
from nsp.raster.vq import VqTokenizer
from nsp.text.encoder import TextEncoderStage, check_text_parts
from nsp.text.tokenizer import PromptTokenizer
from nsp.training.tokens import Conditions

if TYPE_CHECKING:
    from transformers import CLIPTextModel


class LatentGptSystem(RasterSystem):
    """Image tokenizer, transformer and, for text, the CLIP encoder with its prompt tokenizer."""

    family: ClassVar[str] = "latent_gpt"
    config: LatentGptConfig
    text_encoder: "CLIPTextModel | None"
    gpt: Gpt

    def __init__(
        self,
        config: LatentGptConfig,
        *,
        text_encoder: "CLIPTextModel | None" = None,
        prompt_tokenizer: PromptTokenizer | None = None,
    ) -> None:
        super().__init__(config, text_encoder, prompt_tokenizer)
        if (config.text is None) != (text_encoder is None or prompt_tokenizer is None):
            raise ConfigError(
                "a text-conditional model needs a text encoder and a tokenizer, an unconditional "
                "one has neither"
            )
        self.vq, self.gpt = VqTokenizer(config.vq), Gpt(config)
        if config.text is not None and text_encoder is not None and prompt_tokenizer is not None:
            check_text_parts(
                text_encoder,
                prompt_tokenizer,
                text_width=config.text.text_width,
                max_tokens=config.text.max_tokens,
            )

    @property
    def conditions(self) -> Conditions:
        """How captions become conditions; 1 for a model without."""
        return 1 if self.config.text is None else self.encode_prompts

    def units(self) -> Sequence[nn.Module]:
        """Return self-attention and feed-forward of every block.

        Not whole blocks: the text's keys and values are computed ahead of them.
        """
        return [block.get_submodule(part) for block in self.gpt.blocks for part in ("attn", "ffn")]

    def logits(
        self, condition_B: Tensor, dropped_B: Tensor, codes_BN: Tensor, patch_side: int = 1
    ) -> Tensor:
        """Return the logits (B, M, V) of every patch, from the prompt and the patches before.

        `condition_B` are token ids (B, T) of prompts; an unconditional model ignores it.
        """
        if self.config.text is None:
            nothing = [None] * len(self.gpt.blocks)
            alone: Tensor = self.gpt(nothing, codes_BN, patch_side=patch_side)
            return alone
        # An encoder that learns moves the null prompt, too: it is encoded here, not read.
        empty_1T = self.encode_prompts([""]).to(condition_B)
        states = TextEncoderStage(self.text_encoder)(torch.cat([condition_B, empty_1T]))[0]
        rows = torch.arange(len(dropped_B), device=dropped_B.device)
        rows = torch.where(dropped_B, len(dropped_B), rows)
        pairs = self.gpt.read(states)
        texts = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in pairs]
        found: Tensor = self.gpt(texts, codes_BN, patch_side=patch_side)
        return found

    @torch.no_grad()
    def settle(self) -> None:
        """Keep what the text encoder makes of "", so that no prompt needs no encoder."""
        if self.text_encoder is not None:
            empty_1T = self.encode_prompts([""]).to(self.text_encoder.device)
            states = TextEncoderStage(self.text_encoder)(empty_1T)[0]
            self.gpt.null_context.copy_(states)
