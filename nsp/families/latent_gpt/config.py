"""Configuration of the family `latent_gpt`: tokenizer, transformer, condition, and named sizes.

Source of the numbers: github.com/ShlomiRex/final_project (sizes); Radford et al. 2019 and
transformers' GPT2LMHeadModel (block); Esser et al. 2021, arXiv:2012.09841 (tokenizer).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nsp.config import Config, ModelConfig
from nsp.errors import ConfigError
from nsp.raster.grid import RasterGrid
from nsp.raster.vq_config import VqConfig

_MAX_SIDE = 128  # of the grid: 16,384 codes


@dataclass(frozen=True, kw_only=True)
class TextCondition(Config):
    """CLIP's token states, read by cross-attention in every block; CLIP ViT-B/32 has these."""

    text_width: int = 512  # W
    max_tokens: int = 77  # T, fixed: there is no mask for padding

    def __post_init__(self) -> None:
        """Check the sizes."""
        self.check_counts("condition", "text_width", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class GptConfig(Config):
    """The transformer; see model.py."""

    depth: int
    width: int  # D
    num_heads: int  # H
    hidden_width: int | None = None  # of the feed-forward; None: four times the width
    gelu: Literal["exact", "tanh"] = "exact"  # "tanh" is GPT-2's approximation
    norm_eps: float = 1e-5
    dropout: float = 0.1  # after the embedding and every branch
    cond_drop_rate: float = 0.1  # share of the prompts replaced by the null one in training

    def __post_init__(self) -> None:
        """Check the values."""
        self.check_counts("gpt", "depth", "width", "num_heads")
        self.check_fractions("gpt", "dropout", "cond_drop_rate")
        self.check_reals("gpt", "norm_eps", least=1e-12, most=0.1)
        if self.hidden_width is not None:
            self.check_counts("gpt", "hidden_width")
        if self.width % self.num_heads:
            raise ConfigError(
                f"gpt: width={self.width} must be a multiple of num_heads={self.num_heads}"
            )

    @property
    def head_width(self) -> int:
        """K, channels per attention head."""
        return self.width // self.num_heads

    @property
    def ffn_width(self) -> int:
        """Channels inside the feed-forward."""
        return 4 * self.width if self.hidden_width is None else self.hidden_width


# The f16 VQGAN: 256 px to 16x16 codes.
F16_VQ = VqConfig(is_normalised=False, codebook_width=256)


@dataclass(frozen=True, kw_only=True)
class LatentGptConfig(ModelConfig):
    """One complete model."""

    grid_side: int = 16  # codes along one side of a picture
    vq: VqConfig = F16_VQ
    # A file of published VQGAN weights that decides `vq`; None in a finished model.
    pretrained_vq: str | None = None
    gpt: GptConfig
    # None: all pictures are drawn without a condition, and blocks have no cross-attention.
    text: TextCondition | None = field(default_factory=TextCondition)

    def __post_init__(self) -> None:
        """Check the grid."""
        self.check_counts("model", "grid_side", least=2, most=_MAX_SIDE)

    @property
    def image_size_px(self) -> int:
        """Side of the square image."""
        return self.grid_side * self.vq.downsampling

    @property
    def bos(self) -> int:
        """The token that begins every picture: the first number after the codes."""
        return self.vq.codebook_size

    @property
    def grid(self) -> RasterGrid:
        """What the raster loop needs to know."""
        return RasterGrid(
            side=self.grid_side,
            num_codes=self.vq.codebook_size,
            num_prefix=1,  # the beginning
            depth=self.gpt.depth,
            num_kv_heads=self.gpt.num_heads,
            head_width=self.gpt.head_width,
        )


# 64 px to 8x8 codes. Four by four pixels are folded into channels first: on a CPU the levels of
# full and half resolution would cost twice all others together.
EMOJI_VQ = VqConfig(
    codebook_size=1024,
    codebook_width=16,
    is_normalised=False,
    latent_channels=64,
    base_channels=64,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    patch_size=4,
    norm_groups=8,
)
# 256 px to 16x16 codes, with a decoder for CPUs.
SMALL_VQ = VqConfig(
    is_normalised=False,
    codebook_width=64,
    latent_channels=64,
    base_channels=64,
    channel_multipliers=(1, 2, 4),
    num_res_blocks=1,
    patch_size=4,
)

SIZES: Mapping[str, LatentGptConfig] = {
    "500m": LatentGptConfig(gpt=GptConfig(depth=24, width=1024, num_heads=16)),
    "small": LatentGptConfig(gpt=GptConfig(depth=12, width=512, num_heads=8)),
    # The CPU's case: the published grid and codebook in a width that two cores run in seconds.
    "w512": LatentGptConfig(vq=SMALL_VQ, gpt=GptConfig(depth=8, width=512, num_heads=8)),
    "emoji": LatentGptConfig(
        grid_side=8,
        vq=EMOJI_VQ,
        gpt=GptConfig(depth=6, width=256, num_heads=4),
        text=TextCondition(text_width=128, max_tokens=16),
    ),
    "tiny": LatentGptConfig(
        grid_side=4,
        vq=VqConfig(
            codebook_size=64,
            codebook_width=8,
            is_normalised=False,
            latent_channels=8,
            base_channels=8,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            norm_groups=4,
        ),
        gpt=GptConfig(depth=2, width=32, num_heads=4),
        text=TextCondition(text_width=16, max_tokens=8),
    ),
}
