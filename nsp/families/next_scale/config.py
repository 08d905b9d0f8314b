"""Configuration of the family `next_scale`: sizes, autoencoder, generator, and the named sizes.

Sides are of latents, in cells; images are `vae.downsampling` times as large.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nsp.config import Config, ModelConfig
from nsp.errors import ConfigError

_MAX_FLOW_STEPS = 2**12  # a picture has 16
_SCALING_FACTOR = {"least": 1e-6, "most": 1e6}  # beyond, float32 latents are zero or overflow


@dataclass(frozen=True, kw_only=True)
class VaeConfig(Config):
    """A `diffusers.AutoencoderKL`: image (B,3,H,W) in [-1,1] <-> latent (B,C,h,w)."""

    block_out_channels: tuple[int, ...]  # finest level first; each further one halves the side
    layers_per_block: int = 2
    latent_channels: int = 4  # C
    norm_num_groups: int = 32
    scaling_factor: float = 1.0  # of latents; a trained one measures its own (vae.py)
    # Divides all activations of the decoder, by a power of two, so that they fit float16; weights
    # are stored divided. See `vae.rescale_decoder`.
    decoder_scale: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        self.check_counts("vae", "layers_per_block", "latent_channels", "norm_num_groups")
        self.check_counts("vae", "decoder_scale")
        self.check_counts("vae", "block_out_channels")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ConfigError(
                    f"vae: block_out_channels={list(self.block_out_channels)} must be multiples of "
                    f"norm_num_groups={self.norm_num_groups}"
                )
        self.check_reals("vae", "scaling_factor", **_SCALING_FACTOR)
        if self.decoder_scale & (self.decoder_scale - 1):
            raise ConfigError(
                f"vae: decoder_scale must be a power of two, got {self.decoder_scale}: only that "
                "leaves every other bit of the weights as it is"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along one axis."""
        return 1 << (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class TextCondition(Config):
    """CLIP text: the mean of the token states; a learned vector is used without a prompt."""

    text_width: int
    max_tokens: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        self.check_counts("text", "text_width", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(Config):
    """The generator: the base makes the first latent, and a predictor each larger one."""

    width: int = 64  # W, feature channels of predictors and refinement
    growth: int = 32  # channels a layer of a residual dense block adds
    num_blocks: int = 3  # dense blocks, each followed by attention, of a predictor
    num_heads: int = 8
    num_kv_groups: int = 2  # heads of keys and values; 1 is multi-query attention
    attn_max_size: int = 64  # a latent with a larger side attends only to coarser ones
    condition_width: int = 512  # D
    cond_drop_rate: float = 0.1  # fraction of prompts replaced by the null vector, for guidance
    dropout: float = 0.05  # of feature maps in dense blocks
    base: Literal["flow", "regression"] = "flow"
    base_width: int = 64
    base_blocks: int = 4  # as num_blocks, of the base
    flow_steps: int = 16  # Euler steps from noise to the first latent

    def __post_init__(self) -> None:
        """Check the values."""
        counts = ("width", "growth", "num_blocks", "num_heads", "num_kv_groups", "attn_max_size")
        self.check_counts("generator", *counts, "condition_width", "base_width")
        self.check_counts("generator", "flow_steps", most=_MAX_FLOW_STEPS)
        self.check_counts("generator", "base_blocks", least=0)
        for name in ("width", "base_width"):
            width = getattr(self, name)
            if width % self.num_heads or width % 4:
                raise ConfigError(
                    f"generator: {name}={width} must be a multiple of 4 and of "
                    f"num_heads={self.num_heads}"
                )
        if self.num_heads % self.num_kv_groups:
            raise ConfigError(
                f"generator: num_heads={self.num_heads} must be a multiple of "
                f"num_kv_groups={self.num_kv_groups}"
            )
        self.check_fractions("generator", "cond_drop_rate", "dropout")

    @property
    def head_width(self) -> int:
        """K, channels per attention head of a predictor."""
        return self.width // self.num_heads


@dataclass(frozen=True, kw_only=True)
class NextScaleConfig(ModelConfig):
    """One complete `next_scale` model."""

    initial_size: int  # side of the first latent, made from noise
    target_size: int  # side of the finished image, in pixels
    scale_factor: int = 2  # from one latent's side to the next one's
    vae: VaeConfig
    generator: GeneratorConfig
    text: TextCondition
    # An AutoencoderKL folder; a new model gets its configuration and weights, then this is removed.
    pretrained_vae: str | None = None

    def __post_init__(self) -> None:
        """Check that the sides lead from initial size to target; errors name the nearest."""
        self.check_counts("next_scale", "initial_size", "target_size")
        self.check_counts("next_scale", "scale_factor", least=2)
        pixels = self.vae.downsampling
        latent, rest = divmod(self.target_size, pixels)
        if rest or latent not in self.sides[1:]:
            raise ConfigError(self._advice())
        if self.generator.attn_max_size < self.initial_size:
            raise ConfigError(
                f"generator: attn_max_size={self.generator.attn_max_size} is below "
                f"initial_size={self.initial_size}: no latent would have keys to attend to"
            )

    def with_parts_of(self, trained: "NextScaleConfig") -> "NextScaleConfig":
        """Return these sizes with the autoencoder and the text encoder of a trained model."""
        return dataclasses.replace(self, vae=trained.vae, text=trained.text, pretrained_vae=None)

    def _advice(self) -> str:
        """Return what is wrong with the sizes and the nearest ones that fit."""
        first, factor, pixels = self.initial_size, self.scale_factor, self.vae.downsampling
        targets = [first * factor * pixels]
        while targets[-1] < self.target_size:
            targets.append(targets[-1] * factor)
        text = (
            f"target_size={self.target_size} cannot be reached from initial_size={first} by "
            f"scale_factor={factor}: it must be {pixels} px per latent cell times {first} times a "
            f"power of {factor}, at least the first; nearest target_size: {_either(targets[-2:])}"
        )
        latent, rest = divmod(self.target_size, pixels)
        firsts = []
        while not rest and latent and not latent % factor:
            latent //= factor
            firsts.append(latent)
        if firsts:
            nearest = sorted(firsts, key=lambda size: abs(math.log(size / first)))[:2]
            text += f"; nearest initial_size: {_either(nearest)}"
        return text

    @property
    def sides(self) -> tuple[int, ...]:
        """s_0 .. s_K, the sides of the latents."""
        sides = [self.initial_size]  # computed with integers, because a logarithm would round
        while sides[-1] < self.latent_side:
            sides.append(sides[-1] * self.scale_factor)
        return tuple(sides)

    @property
    def num_scales(self) -> int:
        """The number of latents: that of the base and one per predictor."""
        return len(self.sides)

    @property
    def num_predictors(self) -> int:
        """K, the number of upscaling steps."""
        return len(self.sides) - 1

    @property
    def latent_side(self) -> int:
        """Side of the finished latent."""
        return self.target_size // self.vae.downsampling

    @property
    def image_size_px(self) -> int:
        """Side of the square image."""
        return self.target_size

    def has_keys(self, predictor: int) -> bool:
        """Return whether predictor k computes its own keys and values, and caches them."""
        return self.sides[predictor] <= self.generator.attn_max_size

    def past_tokens(self, predictor: int) -> int:
        """Return how many tokens of coarser latents predictor k attends to."""
        return sum(s**2 for k, s in enumerate(self.sides[:predictor]) if self.has_keys(k))

    @property
    def cache_tokens(self) -> int:
        """Tokens of the whole cache."""
        return self.past_tokens(self.num_predictors)


def _either(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes))


@dataclass(frozen=True, kw_only=True)
class ScalesSettings(Config):
    """The scales that a phase trains; scale 0 is the base, and predictor k - 1 makes scale k."""

    first_scale: int = 0
    last_scale: int | None = None  # None: the finished latent
    noise: float = 0.1  # largest deviation added to the latents that predictors start from
    train_text_encoder: bool | None = None  # None: where scale 0 is among those trained
    sample_guidance_scale: float = 2.0

    def __post_init__(self) -> None:
        """Check the deviation."""
        if not 0 <= self.noise < 10:
            raise ConfigError(f"objective.noise must be in [0, 10), got {self.noise}")

    def scales(self, config: NextScaleConfig) -> range:
        """Return the scales to train; raise ConfigError for scales that the model does not have."""
        last = config.num_scales - 1
        end = last if self.last_scale is None else self.last_scale
        if not 0 <= self.first_scale <= end <= last:
            raise ConfigError(
                f"scales {self.first_scale} to {end} are requested, but this model has 0 to {last} "
                f"(latents of side {', '.join(map(str, config.sides))})"
            )
        return range(self.first_scale, end + 1)


# stabilityai/sdxl-vae, config.json.
SDXL_VAE = VaeConfig(block_out_channels=(128, 256, 512, 512), scaling_factor=0.13025)

SIZES: Mapping[str, NextScaleConfig] = {
    # Latents 16, 32, 64, 128 to images of 1024 px, with CLIP ViT-L/14.
    "sdxl": NextScaleConfig(
        initial_size=16,
        target_size=1024,
        vae=SDXL_VAE,
        generator=GeneratorConfig(),
        text=TextCondition(text_width=768, max_tokens=77),
    ),
    # 64 px to 16x16 latents; only the first latent is random, so the base has most weights.
    "emoji": NextScaleConfig(
        initial_size=4,
        target_size=64,
        vae=VaeConfig(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8),
        generator=GeneratorConfig(
            base_width=192, base_blocks=6, condition_width=192, growth=32, flow_steps=16
        ),
        text=TextCondition(text_width=128, max_tokens=16),
    ),
    "tiny": NextScaleConfig(
        initial_size=2,
        target_size=16,
        vae=VaeConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4),
        generator=GeneratorConfig(
            width=16,
            growth=4,
            num_blocks=2,
            num_heads=4,
            condition_width=16,
            base_width=16,
            base_blocks=1,
            flow_steps=3,
        ),
        text=TextCondition(text_width=16, max_tokens=8),
    ),
}
