"""The side of the family `next_patch` that needs torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from nsp.data.ten_crop import Extraction
from nsp.errors import ConfigError
from nsp.families.next_patch.config import NextPatchConfig
from nsp.families.next_patch.model import initialize
from nsp.families.next_patch.modules import build_stages
from nsp.families.next_patch.published import load_pretrained
from nsp.families.next_patch.system import NextPatchSystem
from nsp.raster.raster_learner import SHARP_STD, RasterLearner, untrained_source
from nsp.text.parts import TextEncoderSettings
from nsp.text.t5 import t5_parts
from nsp.text.tokenizer import PromptTokenizer
from nsp.training.code_sets import write_codes

if TYPE_CHECKING:
    from transformers import T5EncoderModel

    from nsp.data.sources import ImageSource


class NextPatchLearner(RasterLearner[NextPatchConfig, NextPatchSystem]):
    """The torch side of the family `next_patch`."""

    def build(
        self,
        config: NextPatchConfig,
        *,
        text_encoder: "T5EncoderModel | None",
        prompt_tokenizer: PromptTokenizer | None,
    ) -> NextPatchSystem:
        """Return a system whose weights will be loaded."""
        return NextPatchSystem(config, text_encoder=text_encoder, prompt_tokenizer=prompt_tokenizer)

    def new_system(
        self,
        config: NextPatchConfig,
        text_encoder: TextEncoderSettings,
        source: "ImageSource | None",
    ) -> NextPatchSystem:
        """Return a freshly initialised system, drawn from torch's global generator.

        A pretrained T5 folder decides the width of the caption condition; otherwise the prompt
        tokenizer is trained on the captions of `source`, and the encoder is new.
        """
        begun = dataclasses.replace(config, pretrained_vq=None, pretrained_gpt=None)
        encoder, tokenizer, caption = None, None, config.caption
        if caption is not None:
            tokenizer, encoder = t5_parts(
                text_encoder, caption.text_width, caption.max_tokens, source
            )
            caption = dataclasses.replace(caption, text_width=encoder.config.d_model)
            begun = dataclasses.replace(begun, condition=caption)
        system = NextPatchSystem(begun, text_encoder=encoder, prompt_tokenizer=tokenizer)
        initialize(system.gpt)
        bound = 1 / config.vq.codebook_width**0.5
        nn.init.uniform_(system.vq.quantize.embedding.weight, -bound, bound)
        load_pretrained(system, config)
        return system

    def untrained(self, config: NextPatchConfig) -> NextPatchSystem:
        """Return a system of random weights in which all matter; with captions, a new T5 too."""
        encoder = TextEncoderSettings(vocab_size=560, depth=2, num_heads=2)
        system = self.new_system(config, encoder, untrained_source())
        nn.init.normal_(system.gpt.output.weight, std=SHARP_STD)
        return system

    def modules(self, system: NextPatchSystem, kv_layout: str) -> Mapping[str, nn.Module]:
        """Return a module for every stage."""
        return build_stages(system, kv_layout)

    def write_codes(
        self, system: NextPatchSystem, source: "ImageSource", folder: Path, settings: Extraction
    ) -> int:
        """Write codes of crops of pictures to a folder; return of how many they were missing.

        Raises ConfigError for crops that are not a whole number of codes wide.
        """
        per_code_px, side_px = system.config.vq.downsampling, settings.image_size_px
        if side_px % per_code_px:
            fitting_px = -(-side_px // per_code_px) * per_code_px
            raise ConfigError(
                f"--image-size {side_px}: a code of this tokenizer is {per_code_px} px wide, so "
                f"give a multiple of {per_code_px}, such as {fitting_px}"
            )
        return write_codes(system.tokenizing(), source, folder, settings)
