"""Configuration of the family `latent_gpt`: tokenizer, transformer, condition, and named sizes.

Source of the numbers: github.com/ShlomiRex/final_project (sizes); Radford et al. 2019 and
transformers' GPT2LMHeadModel (block); Esser et al. 2021, arXiv:2012.09841 (tokenizer).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from nsp.config import Config
from nsp.raster.raster_config import RasterConfig, TransformerConfig
from nsp.raster.vq_config import EMOJI_VQ, SMALL_VQ, TINY_VQ, VqConfig


@dataclass(frozen=True, kw_only=True)
class TextCondition(Config):
    """CLIP's token states, read by cross-attention in every block; CLIP ViT-B/32 has these."""

    text_width: int = 512  # W
    max_tokens: int = 77  # T, fixed: there is no mask for padding

    def __post_init__(self) -> None:
        """Check the sizes."""
        self.check_counts("condition", "text_width", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class GptConfig(TransformerConfig):
    """The transformer; see model.py."""

    hidden_width: int | None = None  # of the feed-forward; None: four times the width
    gelu: Literal["exact", "tanh"] = "exact"  # "tanh" is GPT-2's approximation
    dropout: float = 0.1  # after the embedding and every branch

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.check_fractions("gpt", "dropout")
        if self.hidden_width is not None:
            self.check_counts("gpt", "hidden_width")

    @property
    def ffn_width(self) -> int:
        """Channels inside the feed-forward."""
        return 4 * self.width if self.hidden_width is None else self.hidden_width


# The f16 VQGAN: 256 px to 16x16 codes.
F16_VQ = VqConfig(is_normalised=False, codebook_width=256)


@dataclass(frozen=True, kw_only=True)
class LatentGptConfig(RasterConfig):
    """One complete model."""

    vq: VqConfig = F16_VQ
    # A file of published VQGAN weights that decides `vq`; None in a finished model.
    pretrained_vq: str | None = None
    gpt: GptConfig
    # None: all pictures are drawn without a condition, and blocks have no cross-attention.
    text: TextCondition | None = field(default_factory=TextCondition)

    @property
    def bos(self) -> int:
        """The token that begins every picture: the first number after the codes."""
        return self.vq.codebook_size


SIZES: Mapping[str, LatentGptConfig] = {
    "500m": LatentGptConfig(gpt=GptConfig(depth=24, width=1024, num_heads=16)),
    "small": LatentGptConfig(gpt=GptConfig(depth=12, width=512, num_heads=8)),
    # The CPU's case: the published grid and codebook in a width that two cores run in seconds.
    "w512": LatentGptConfig(
        vq=replace(SMALL_VQ, is_normalised=False, codebook_width=64),
        gpt=GptConfig(depth=8, width=512, num_heads=8),
    ),
    "emoji": LatentGptConfig(
        grid_side=8,
        vq=replace(EMOJI_VQ, is_normalised=False),
        gpt=GptConfig(depth=6, width=256, num_heads=4),
        text=TextCondition(text_width=128, max_tokens=16),
    ),
    "tiny": LatentGptConfig(
        grid_side=4,
        vq=replace(TINY_VQ, is_normalised=False),
        gpt=GptConfig(depth=2, width=32, num_heads=4),
        text=TextCondition(text_width=16, max_tokens=8),
    ),
}
