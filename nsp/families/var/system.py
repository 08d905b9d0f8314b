"""All trainable parts of one `var` model together, as in checkpoints."""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nsp.errors import ConfigError
from nsp.families.var.config import VarConfig
from nsp.families.var.model import Conditioning, NextScaleTransformer
from nsp.families.var.vqvae import VQVAE
from nsp.family.system import System
from nsp.text.encoder import TextEncoderStage, check_text_parts
from nsp.text.tokenizer import PromptTokenizer
from nsp.training.tokens import Tokenizing

if TYPE_CHECKING:
    from transformers import CLIPTextModel


class VarSystem(System):
    """Tokenizer, transformer and, for text, the CLIP encoder with its prompt tokenizer."""

    family: ClassVar[str] = "var"
    config: VarConfig

    def __init__(
        self,
        config: VarConfig,
        *,
        text_encoder: "CLIPTextModel | None" = None,
        prompt_tokenizer: PromptTokenizer | None = None,
    ) -> None:
        if (config.text is None) != (text_encoder is None or prompt_tokenizer is None):
            raise ConfigError(
                "a text-conditional model needs a text encoder and a tokenizer, "
                "a class-conditional one has neither"
            )
        super().__init__(config, text_encoder, prompt_tokenizer)
        self.vae = VQVAE(config.vae, config.patch_nums)
        self.predictor = NextScaleTransformer(config)
        if config.text is not None and text_encoder is not None and prompt_tokenizer is not None:
            check_text_parts(
                text_encoder,
                prompt_tokenizer,
                text_width=config.text.text_width,
                max_tokens=config.text.max_tokens,
            )

    def tokenizing(self) -> Tokenizing:
        """Return how pictures become tokens: no usage statistic, and no decoder, decides them."""
        vae = self.vae
        return Tokenizing(
            vae,
            lambda image: torch.cat(vae.tokenize(image), 1),
            (vae.config, vae.quantize.patch_nums),
            others=("quantize.ema_vocab_hit_SV", "decoder.", "post_quant_conv."),
        )

    def condition(self, condition_B: Tensor, dropped_B: Tensor) -> Conditioning:
        """Return the training conditioning of class ids (B,) or prompt token ids (B, T).

        Rows where `dropped_B` (bool) holds get the null condition instead.
        """
        if self.config.text is None:
            null = torch.full_like(condition_B, self.config.num_classes)
            return self.predictor.condition_on_class(torch.where(dropped_B, null, condition_B))
        if self.config.text.null == "empty_prompt":
            condition_B = torch.cat([condition_B, self.encode_prompts([""]).to(condition_B)])
        states, pooled = TextEncoderStage(self.text_encoder)(condition_B)
        rows = torch.arange(len(dropped_B), device=dropped_B.device)
        null_row = torch.full_like(rows, len(dropped_B))
        return self.predictor.condition_on_text(
            states, pooled, torch.where(dropped_B, null_row, rows)
        )
