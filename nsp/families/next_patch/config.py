"""Configuration of the family `next_patch`: tokenizer, transformer, condition, and named sizes.

Source of the numbers: Sun et al. 2024, arXiv:2406.06525, and github.com/FoundationVision/LlamaGen;
Pang et al. 2024, arXiv:2412.15321 changes only how such a model is trained.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nsp.config import Config
from nsp.errors import ConfigError
from nsp.family.classes import ClassCondition, classes_of
from nsp.raster.raster_config import RasterConfig, TransformerConfig
from nsp.raster.vq_config import EMOJI_VQ, SMALL_VQ, TINY_VQ, VqConfig

_LARGE = 1e6


@dataclass(frozen=True, kw_only=True)
class CaptionCondition(Config):
    """T5 features of a caption, projected and put before the codes."""

    text_width: int = 2048  # of the features; 2,048 is Flan-T5-XL's
    max_tokens: int = 120  # T, fixed: shorter captions are padded on the left
    kind: Literal["caption"] = "caption"

    def __post_init__(self) -> None:
        """Check the sizes."""
        self.check_counts("condition", "text_width", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class GptConfig(TransformerConfig):
    """The transformer; see model.py."""

    num_kv_heads: int | None = None  # J; None: as many as heads
    multiple_of: int = 256  # the hidden width of the feed-forward is rounded up to it
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10_000.0
    token_dropout: float = 0.1  # after the embedding
    resid_dropout: float = 0.1  # after attention
    ffn_dropout: float = 0.1
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.check_counts("gpt", "multiple_of")
        self.check_fractions("gpt", "token_dropout", "resid_dropout", "ffn_dropout")
        self.check_fractions("gpt", "drop_path_rate")
        self.check_reals("gpt", "rope_base", least=1, most=_LARGE)
        if self.num_kv_heads is not None:
            self.check_counts("gpt", "num_kv_heads")
        if self.ffn_dim_multiplier is not None:
            self.check_reals("gpt", "ffn_dim_multiplier", least=1e-3, most=1e3)
        if self.head_width % 4:
            raise ConfigError(
                f"gpt: width={self.width} over num_heads={self.num_heads} must be a multiple of 4"
            )
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"gpt: num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )

    @property
    def kv_heads(self) -> int:
        """J, heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def hidden_width(self) -> int:
        """Channels inside the feed-forward."""
        hidden = int(2 * (4 * self.width) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(hidden * self.ffn_dim_multiplier)
        return -(-hidden // self.multiple_of) * self.multiple_of


@dataclass(frozen=True, kw_only=True)
class NextPatchConfig(RasterConfig):
    """One complete model."""

    gpt: GptConfig
    condition: ClassCondition | CaptionCondition = field(
        default_factory=lambda: ClassCondition(num_classes=1000)
    )
    # A published file or a checkpoint folder, whose weights a new model begins with.
    pretrained_vq: str | None = None
    pretrained_gpt: str | None = None

    @property
    def caption(self) -> CaptionCondition | None:
        """The caption condition, or None for a class-conditional model."""
        return self.condition if isinstance(self.condition, CaptionCondition) else None

    @property
    def num_classes(self) -> int:
        """The number of classes, which is also the null class's id; ConfigError for text models."""
        if not isinstance(self.condition, ClassCondition):
            raise ConfigError("this model reads captions and has no classes; give it prompts")
        return self.condition.num_classes

    @property
    def num_prefix(self) -> int:
        """T, tokens of the condition before the first code."""
        return 1 if self.caption is None else self.caption.max_tokens


VQ_8 = VqConfig(channel_multipliers=(1, 2, 2, 4))
VQ_16 = VqConfig()

# Depth, width, heads of the published sizes, and of those that the public code only defines.
GPT_SIZES: Mapping[str, tuple[int, int, int]] = {
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (36, 1280, 20),
    "XXL": (48, 1536, 24),
    "XXXL": (48, 2560, 40),
    "1B": (22, 2048, 32),
    "3B": (24, 3200, 32),
    "7B": (32, 4096, 32),
}


def published(name: str, *, grid_side: int = 16) -> NextPatchConfig:
    """Return a published size, class-conditional on ImageNet, with VQ-16."""
    depth, width, num_heads = GPT_SIZES[name]
    gpt = GptConfig(depth=depth, width=width, num_heads=num_heads)
    return NextPatchConfig(grid_side=grid_side, gpt=gpt)


SIZES: Mapping[str, NextPatchConfig] = {
    **{name: published(name) for name in GPT_SIZES},
    # The CPU's case: the published grid and codebook in a width that two cores run in seconds.
    "w512": NextPatchConfig(vq=SMALL_VQ, gpt=GptConfig(depth=8, width=512, num_heads=8)),
    "emoji": NextPatchConfig(
        grid_side=8,
        vq=EMOJI_VQ,
        gpt=GptConfig(depth=6, width=256, num_heads=4, multiple_of=64),
        condition=CaptionCondition(text_width=128, max_tokens=16),
    ),
    "tiny": NextPatchConfig(
        grid_side=4,
        vq=TINY_VQ,
        gpt=GptConfig(depth=2, width=32, num_heads=4, num_kv_heads=2, multiple_of=16),
        condition=CaptionCondition(text_width=16, max_tokens=16),
    ),
}


def with_classes(config: NextPatchConfig, names: Sequence[str]) -> NextPatchConfig:
    """Return the configuration for these classes, if the model has classes to choose from."""
    if not isinstance(config.condition, ClassCondition):
        return config
    return dataclasses.replace(config, condition=classes_of(config.condition, names))
