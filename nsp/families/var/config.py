"""Configuration of the family `var`: tokenizer, transformer, condition, and the named sizes.

Source of the numbers: Tian et al. 2024, arXiv:2404.02905, and github.com/FoundationVision/VAR.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nsp.config import Config, ModelConfig
from nsp.errors import ConfigError
from nsp.family.classes import ClassCondition, classes_of
from nsp.values import shown

SCHEDULES: dict[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}

_MAX_TOKENS = 2**15  # the mask has their square; the published schedule of 1024 px has 9,451
# Bounds far from any use; float32 overflows, or divides by zero, well beyond them.
_LARGE = 1e6
_MAX_MLP_RATIO = 1e3
_NORM_EPS = {"least": 1e-12, "most": 0.1}
_MAX_SIZE_PX = 2**20


@dataclass(frozen=True, kw_only=True)
class VaeConfig(Config):
    """The multi-scale residual VQVAE: image (B,3,H,W) in [-1,1] <-> token maps r_0 .. r_{S-1}."""

    vocab_size: int  # V
    latent_channels: int  # C, width of a code vector
    base_channels: int  # width of the finest level; the stock model has 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2  # per encoder level; the decoder has one more
    patch_size: int = 1  # pixels folded into channels before the finest level; the stock model: 1
    norm_groups: int = 32
    quant_conv_kernel: int = 3
    commitment_weight: float = 0.25  # beta of the VQ loss
    using_znorm: bool = False  # nearest code by cosine similarity
    quant_resi: float = 0.5  # strength q of phi(x) = (1-q) x + q conv(x)
    share_quant_resi: int = 4  # 1: one phi; 0: one per scale; K >= 2: K phis shared by ticks
    default_qresi_counts: int = 0  # with share_quant_resi 0: number of phis, 0 = number of scales
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        counts = ("vocab_size", "latent_channels", "base_channels", "num_res_blocks")
        self.check_counts("vae", *counts, "patch_size", "norm_groups", "channel_multipliers")
        self.check_counts("vae", "share_quant_resi", "default_qresi_counts", least=0)
        self.check_counts("vae", "quant_conv_kernel")
        self.check_fractions("vae", "dropout")
        self.check_reals("vae", "commitment_weight", least=0, most=_LARGE)
        self.check_reals("vae", "quant_resi", least=0, most=1)
        if self.quant_conv_kernel % 2 == 0:
            raise ConfigError(f"vae: quant_conv_kernel must be odd, got {self.quant_conv_kernel}")
        if self.base_channels % self.norm_groups:
            raise ConfigError(
                f"vae: base_channels={self.base_channels} must be a multiple of "
                f"norm_groups={self.norm_groups}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along one axis."""
        return int(self.patch_size * 2 ** (len(self.channel_multipliers) - 1))

    def num_phis(self, num_scales: int) -> int:
        """Return how many phi convolutions exist for a schedule of `num_scales`."""
        if self.share_quant_resi == 0:
            return self.default_qresi_counts or num_scales
        return self.share_quant_resi

    def phi_indices(self, num_scales: int) -> tuple[int, ...]:
        """Return which phi each scale uses.

        Two ticks are often equally near in exact arithmetic; the published models were trained with
        the outcome of float64 rounding, so this must stay NumPy float64 (float32 picks other
        convolutions for K=4, S=10).
        """
        count = self.num_phis(num_scales)
        if count == 1:
            return (0,) * num_scales
        first = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = np.linspace(first, 1 - first, count)
        # A single scale sits at ratio 0; the reference divides by zero there.
        ratios = [scale / max(num_scales - 1, 1) for scale in range(num_scales)]
        return tuple(int(np.argmin(np.abs(ticks - ratio))) for ratio in ratios)


@dataclass(frozen=True, kw_only=True)
class TextCondition(Config):
    """CLIP text: token states by cross-attention in every block, pooled ones through AdaLN."""

    text_width: int
    max_tokens: int
    null: Literal["learned", "empty_prompt"] = "learned"
    kind: Literal["text"] = "text"

    def __post_init__(self) -> None:
        """Check the sizes."""
        self.check_counts("condition", "text_width", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class PredictorConfig(Config):
    """The next-scale transformer; positions are absolute, with an embedding per scale level."""

    depth: int
    width: int  # C
    num_heads: int  # H
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True
    cond_drop_rate: float = 0.1
    drop_path_rate: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        self.check_counts("predictor", "depth", "width", "num_heads")
        self.check_fractions("predictor", "cond_drop_rate", "drop_path_rate", "dropout")
        if self.width % self.num_heads:
            raise ConfigError(
                f"predictor: width={self.width} must be a multiple of num_heads={self.num_heads}"
            )
        self.check_reals("predictor", "mlp_ratio", least=0, most=_MAX_MLP_RATIO)
        if round(self.width * self.mlp_ratio) < 1:
            raise ConfigError(
                f"predictor: mlp_ratio={self.mlp_ratio} must leave the hidden layer a channel"
            )
        self.check_reals("predictor", "norm_eps", **_NORM_EPS)

    @property
    def head_width(self) -> int:
        """K, channels per attention head."""
        return self.width // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VarConfig(ModelConfig):
    """One complete `var` model: its scale schedule, tokenizer, transformer and condition."""

    patch_nums: tuple[int, ...]
    vae: VaeConfig
    predictor: PredictorConfig
    condition: ClassCondition | TextCondition

    def __post_init__(self) -> None:
        """Check that the schedule grows strictly."""
        grows = all(a < b for a, b in zip(self.patch_nums, self.patch_nums[1:], strict=False))
        if not self.patch_nums or self.patch_nums[0] < 1 or not grows:
            given = shown(list(self.patch_nums))
            raise ConfigError(f"patch_nums={given} must be positive and strictly increasing")
        if self.num_tokens > _MAX_TOKENS:
            raise ConfigError(
                f"patch_nums={list(self.patch_nums)[:20]} are {self.num_tokens} tokens; at most "
                f"{_MAX_TOKENS} are possible"
            )
        if self.image_size_px > _MAX_SIZE_PX:
            raise ConfigError(
                f"patch_nums={list(self.patch_nums)} times {self.vae.downsampling} px per cell is "
                f"beyond {_MAX_SIZE_PX} px"
            )

    @property
    def num_scales(self) -> int:
        """S, the number of scale steps."""
        return len(self.patch_nums)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all scales together."""
        return sum(side**2 for side in self.patch_nums)

    @property
    def latent_side(self) -> int:
        """Side h = w of the latent grid: the last side of the schedule."""
        return self.patch_nums[-1]

    @property
    def image_size_px(self) -> int:
        """Side of the square image."""
        return self.latent_side * self.vae.downsampling

    @property
    def text(self) -> TextCondition | None:
        """The text condition, or None for a class-conditional model."""
        return self.condition if isinstance(self.condition, TextCondition) else None

    @property
    def num_classes(self) -> int:
        """The number of classes, which is also the null class's id; ConfigError for text models."""
        if not isinstance(self.condition, ClassCondition):
            raise ConfigError("this model is text-conditional and has no classes; give it prompts")
        return self.condition.num_classes


STOCK_VAE = VaeConfig(vocab_size=4096, latent_channels=32, base_channels=160)


def _published(depth: int, image_size_px: int = 256, *, shared_aln: bool = False) -> VarConfig:
    """Return a published size: heads = depth, width = 64 depth, drop-path 0.1 depth / 24."""
    predictor = PredictorConfig(
        depth=depth,
        width=64 * depth,
        num_heads=depth,
        shared_aln=shared_aln,
        drop_path_rate=0.1 * depth / 24,
    )
    return VarConfig(
        patch_nums=SCHEDULES[image_size_px],
        vae=STOCK_VAE,
        predictor=predictor,
        condition=ClassCondition(num_classes=1000),
    )


# 64 px to 8x8 latents, 130 tokens in six scale steps. Four by four pixels are folded into channels
# first: on a CPU the levels of full and half resolution would cost twice all others together.
EMOJI_VAE = VaeConfig(
    vocab_size=1024,
    latent_channels=16,
    base_channels=64,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    patch_size=4,
    norm_groups=8,
    share_quant_resi=1,
)

# 256 px to the stock 16x16 latents. A decoder for CPUs: the stock one is 394 GFLOP an image, five
# times the scale steps of width 512; this one is a tenth of them.
SMALL_VAE = VaeConfig(
    vocab_size=4096,
    latent_channels=32,
    base_channels=64,
    channel_multipliers=(1, 2, 4),
    num_res_blocks=1,
    patch_size=4,
)

SIZES: Mapping[str, VarConfig] = {
    "d16": _published(16),
    "d20": _published(20),
    "d24": _published(24),
    "d30": _published(30),
    "d36-s": _published(36, 512, shared_aln=True),
    # The CPU's case: the published schedule in a width that two cores run in half a second.
    "w512": VarConfig(
        patch_nums=SCHEDULES[256],
        vae=SMALL_VAE,
        predictor=PredictorConfig(depth=8, width=512, num_heads=8),
        condition=ClassCondition(num_classes=1000),
    ),
    "emoji": VarConfig(
        patch_nums=(1, 2, 3, 4, 6, 8),
        vae=EMOJI_VAE,
        predictor=PredictorConfig(depth=6, width=192, num_heads=3, shared_aln=True),
        condition=TextCondition(text_width=128, max_tokens=16),
    ),
    "tiny": VarConfig(
        patch_nums=(1, 2, 3, 4),
        vae=VaeConfig(
            vocab_size=64,
            latent_channels=8,
            base_channels=8,
            channel_multipliers=(1, 1, 2),
            num_res_blocks=1,
            norm_groups=4,
        ),
        predictor=PredictorConfig(depth=2, width=32, num_heads=2),
        condition=TextCondition(text_width=16, max_tokens=8),
    ),
}


def size(name: str) -> VarConfig:
    """Return the named size; raise ConfigError naming the known ones."""
    if name not in SIZES:
        raise ConfigError(f"unknown var size {name!r}; known: {', '.join(SIZES)}")
    return SIZES[name]


def with_condition(config: VarConfig, condition: ClassCondition | TextCondition) -> VarConfig:
    """Return the configuration with another condition (d16 with text, say)."""
    return dataclasses.replace(config, condition=condition)


def with_classes(config: VarConfig, names: Sequence[str]) -> VarConfig:
    """Return the configuration for these classes, if the model has classes to choose from."""
    if not isinstance(config.condition, ClassCondition):
        return config
    return with_condition(config, classes_of(config.condition, names))
