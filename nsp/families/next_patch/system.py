"""All trainable parts of one `next_patch` model together, as in checkpoints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from nsp.errors import ConfigError
from nsp.families.next_patch.config import NextPatchConfig
from nsp.families.next_patch.model import Gpt, prefix_mask
from nsp.raster.raster_system import RasterSystem
from nsp.raster.vq import VqTokenizer
from nsp.text.t5 import T5Stage, check_t5_parts, first_tokens
from nsp.text.tokenizer import PromptTokenizer
from nsp.training.tokens import Conditions

if TYPE_CHECKING:
    from transformers import T5EncoderModel


class NextPatchSystem(RasterSystem):
    """Tokenizer, transformer and, for captions, the T5 encoder with its prompt tokenizer."""

    family: ClassVar[str] = "next_patch"
    config: NextPatchConfig
    gpt: Gpt

    def __init__(
        self,
        config: NextPatchConfig,
        *,
        text_encoder: "T5EncoderModel | None" = None,
        prompt_tokenizer: PromptTokenizer | None = None,
    ) -> None:
        if (config.caption is None) != (text_encoder is None or prompt_tokenizer is None):
            raise ConfigError(
                "a model of captions needs a T5 encoder and its tokenizer, one of classes has "
                "neither"
            )
        super().__init__(config, text_encoder, prompt_tokenizer)
        if config.caption is not None and text_encoder is not None and prompt_tokenizer is not None:
            check_t5_parts(
                text_encoder,
                prompt_tokenizer,
                text_width=config.caption.text_width,
                max_tokens=config.caption.max_tokens,
            )
        self.vq, self.gpt = VqTokenizer(config.vq), Gpt(config)

    @property
    def conditions(self) -> Conditions:
        """How captions become conditions, or the number of classes."""
        return self.config.num_classes if self.config.caption is None else self.encode_prompts

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks of the transformer."""
        return [*self.gpt.layers]

    def logits(
        self, condition_B: Tensor, dropped_B: Tensor, codes_BN: Tensor, patch_side: int = 1
    ) -> Tensor:
        """Return the logits (B, M, V) of every patch, from the condition and the patches before."""
        if self.config.caption is None:
            null_B = torch.full_like(condition_B, self.config.num_classes)
            prefix_B1D = self.gpt.cls_embedding(torch.where(dropped_B, null_B, condition_B))
            found: Tensor = self.gpt(prefix_B1D, codes_BN, patch_side=patch_side)
            return found
        assert self.prompt_tokenizer is not None
        first_B = first_tokens(condition_B, self.prompt_tokenizer.pad_id)
        places_T = torch.arange(condition_B.shape[1], device=condition_B.device)
        with torch.autocast(condition_B.device.type, enabled=False):  # T5 overflows in fp16
            real_BT = (places_T >= first_B[:, None]).long()
            (states_BTC,) = self.text_stage()(condition_B, real_BT)
        return self.caption_logits(states_BTC, first_B, dropped_B, codes_BN, patch_side)

    def caption_logits(
        self,
        states_BTC: Tensor,
        first_B: Tensor,
        dropped_B: Tensor,
        codes_BN: Tensor,
        patch_side: int = 1,
    ) -> Tensor:
        """Return the logits as `logits` does, from the encoded captions.

        `first_B` is the place of a caption's first token; its padding is hidden also where the null
        condition replaces it, as in the public code.
        """
        embedding = self.gpt.cls_embedding
        null_TC = embedding.get_buffer("uncond_embedding").to(states_BTC)
        prefix_BTD = embedding(torch.where(dropped_B[:, None, None], null_TC, states_BTC))
        num_prefix = states_BTC.shape[1]
        length = num_prefix + codes_BN.shape[1] // patch_side**2 - 1
        mask = prefix_mask(first_B, num_prefix, length)
        found: Tensor = self.gpt(prefix_BTD, codes_BN, mask=mask, patch_side=patch_side)
        return found

    def text_stage(self) -> nn.Module:
        """Return the stage that encodes prompts."""
        return T5Stage(self.text_encoder)
