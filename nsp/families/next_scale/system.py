"""All trainable parts of one `next_scale` model together, as in checkpoints."""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from nsp.families.next_scale.config import NextScaleConfig
from nsp.families.next_scale.model import NextScaleGenerator
from nsp.families.next_scale.vae import Vae
from nsp.family.system import System
from nsp.text.encoder import TextEncoderStage, check_text_parts
from nsp.text.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel


class NextScaleSystem(System[NextScaleConfig]):
    """Autoencoder, generator, CLIP text encoder and its prompt tokenizer."""

    family: ClassVar[str] = "next_scale"

    def __init__(
        self,
        config: NextScaleConfig,
        *,
        text_encoder: "CLIPTextModel",
        prompt_tokenizer: PromptTokenizer,
    ) -> None:
        super().__init__(config, text_encoder, prompt_tokenizer)
        check_text_parts(
            text_encoder,
            prompt_tokenizer,
            text_width=config.text.text_width,
            max_tokens=config.text.max_tokens,
        )
        self.vae = Vae(config.vae)
        self.generator = NextScaleGenerator(config)

    def condition(self, token_ids_BT: Tensor, dropped_B: Tensor) -> Tensor:
        """Return condition vectors (B, D); rows where `dropped_B` holds have no prompt."""
        mean = TextMeanStage(self.text_encoder)(token_ids_BT)
        rows = torch.arange(len(dropped_B), device=dropped_B.device)
        null_row = torch.full_like(rows, len(dropped_B))
        condition: Tensor = self.generator.condition(mean, torch.where(dropped_B, null_row, rows))
        return condition


class TextMeanStage(nn.Module):
    """Prompt token ids (N, T) -> the mean state (N, D) of the tokens up to the end token."""

    upto_TT: Tensor

    def __init__(self, model: "CLIPTextModel") -> None:
        super().__init__()
        self.encoder = TextEncoderStage(model)
        length: int = model.config.max_position_embeddings
        upto_TT = torch.ones(length, length, device=model.device).tril()
        self.register_buffer("upto_TT", upto_TT, persistent=False)

    def forward(self, token_ids_NT: Tensor) -> Tensor:
        """Return (N, D) in float32."""
        states_NTD, _ = self.encoder(token_ids_NT)
        num_tokens = token_ids_NT.shape[1]
        ends_NT = self.encoder.end_positions(token_ids_NT).float()
        kept_NT = ends_NT @ self.upto_TT[:num_tokens, :num_tokens]
        total_ND: Tensor = (states_NTD * kept_NT[:, :, None]).sum(1)
        return total_ND / kept_NT.sum(1, keepdim=True)
