"""Configuration of the family `inl_diffusion`, and its named sizes.

Sizes are those of github.com/Web3-League/inl-diffusion, which its own documentation counts too low;
tests/families/inl_diffusion/test_model.py has the true numbers of parameters.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from nsp.config import Config, ModelConfig
from nsp.diffusion.noise import Noise
from nsp.errors import ConfigError

# The neuron of the package's last version, the one its documentation describes, and the mixture.
Integrator: TypeAlias = Literal["controlled", "scalar", "mixture"]
TextKind: TypeAlias = Literal["clip", "t5", "plain", "clip_pair"]
NullCondition: TypeAlias = Literal["learned", "empty_prompt"]

_MOST_PIXELS = 4096
_PLAIN_NOISE = Noise()
ATTENTION_LEVEL = 3  # of the autoencoder: where a picture of 256 px has 32


@dataclass(frozen=True, kw_only=True)
class VaeConfig(Config):
    """The INL-VAE: a KL autoencoder with residual blocks and attention at its bottom."""

    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # per level; each but the last halves
    num_res_blocks: int = 2  # per level of the encoder; the decoder has one more
    latent_channels: int = 4
    latent_scale: float = 0.18215  # of the latents that the transformer sees
    norm_groups: int = 32
    num_heads: int = 8

    def __post_init__(self) -> None:
        """Check that every width divides into groups and heads."""
        counts = ("base_channels", "channel_multipliers", "num_res_blocks", "latent_channels")
        self.check_counts("vae", *counts, "norm_groups", "num_heads", most=8192)
        self.check_reals("vae", "latent_scale", least=1e-6, most=1e6)
        for multiplier in self.channel_multipliers:
            width = self.base_channels * multiplier
            if width % self.norm_groups or width % self.num_heads:
                raise ConfigError(
                    f"vae: {width} channels do not divide into {self.norm_groups} norm_groups and "
                    f"{self.num_heads} num_heads"
                )

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell, along each axis."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True, kw_only=True)
class DitConfig(Config):
    """The INL-DiT: a transformer on patches of noisy latents, with integrator neurons."""

    width: int = 384
    depth: int = 12
    num_heads: int = 6
    num_kv_heads: int = 2
    patch_size: int = 2
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    integrator: Integrator = "controlled"
    num_iterations: int = 2  # of the integrator in every block
    num_experts: int = 4  # of the mixture
    num_active_experts: int = 2
    context_width: int = 2048  # of the text states
    context_length: int = 77  # tokens of a prompt
    # Of a prompt's summary, which the timestep embedding reads; 0: there is none. It stands in one
    # more row behind a prompt's states.
    pooled_width: int = 0

    def __post_init__(self) -> None:
        """Check that widths divide into heads and rotations."""
        self.check_counts(
            "dit",
            *("width", "depth", "num_heads", "num_kv_heads", "patch_size", "num_iterations"),
            *("num_experts", "num_active_experts", "context_width", "context_length"),
            most=65_536,
        )
        self.check_counts("dit", "pooled_width", least=0, most=self.context_width)
        self.check_reals("dit", "mlp_ratio", least=0.01, most=64)
        self.check_fractions("dit", "dropout")
        if self.width % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"dit: width {self.width} must divide by num_heads {self.num_heads}, and these by "
                f"num_kv_heads {self.num_kv_heads}"
            )
        if self.head_width % 4:
            raise ConfigError(
                f"dit: heads of width {self.head_width} cannot turn with rows and columns; width / "
                "num_heads must be a multiple of 4"
            )
        if self.num_active_experts > self.num_experts:
            raise ConfigError(
                f"dit: {self.num_active_experts} of {self.num_experts} experts cannot be active"
            )

    @property
    def num_states(self) -> int:
        """Rows that the text encoder makes of a prompt."""
        return self.context_length + (self.pooled_width > 0)

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.width // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the feed-forward part."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class InlConfig(ModelConfig):
    """One model."""

    latent_side: int = 32  # of the latents it is trained on
    other_sides: tuple[int, ...] = ()  # of further ones, for pictures of other sizes
    vae: VaeConfig = VaeConfig()
    dit: DitConfig = DitConfig()
    noise: Noise = _PLAIN_NOISE
    control_depth: int = 0  # copies of the first blocks, which read a control picture; 0: none
    text: TextKind = "clip"  # whose encoder reads the prompts
    # What stands for no prompt, in training and in guidance alike: a learned condition, or "".
    null_condition: NullCondition = "learned"
    # Only when training begins: a trained autoencoder, see pretrained.py.
    pretrained_vae: str | None = None

    def __post_init__(self) -> None:
        """Check that latents divide into patches, and the number of control blocks."""
        self.check_counts("model", "latent_side", most=_MOST_PIXELS)
        if self.other_sides:
            self.check_counts("model", "other_sides", most=_MOST_PIXELS)
        if len({*self.sides}) != len(self.sides):
            raise ConfigError(f"latent_side {self.latent_side} and other_sides repeat a side")
        self.check_counts("model", "control_depth", least=0, most=self.dit.depth)
        for side in self.sides:
            if side % self.dit.patch_size:
                raise ConfigError(
                    f"latents of {side} cells a side must divide into patches of "
                    f"{self.dit.patch_size}"
                )
        if not 0 < self.image_size_px <= _MOST_PIXELS:
            raise ConfigError(f"pictures of {self.image_size_px} px; at most {_MOST_PIXELS}")

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of all latents, that of `image_size_px` last."""
        return (*self.other_sides, self.latent_side)

    @property
    def image_size_px(self) -> int:
        """Side of the square pictures it is trained on."""
        return self.latent_side * self.vae.downsampling

    @property
    def num_modulations(self) -> int:
        """Shifts, scales and gates of one timestep: six per block and channel, two at the end."""
        return (6 * (self.dit.depth + self.control_depth) + 2) * self.dit.width

    @property
    def num_tokens(self) -> int:
        """Patches of one picture."""
        return (self.latent_side // self.dit.patch_size) ** 2


# As the public training and its pipeline have them: the predicted x_0 is bounded, and the last
# DDIM step ends at the first timestep.
PUBLIC_NOISE = Noise(clip=1.0, ends_at_first=True, scaled_start=True)
_published = partial(InlConfig, noise=PUBLIC_NOISE)

_TINY = InlConfig(
    latent_side=4,
    vae=VaeConfig(
        base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, norm_groups=4, num_heads=2
    ),
    dit=DitConfig(
        width=32,
        depth=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_ratio=2.0,
        context_width=16,
        context_length=8,
    ),
)
_EMOJI = InlConfig(
    latent_side=8,
    vae=VaeConfig(
        base_channels=32, channel_multipliers=(1, 2, 4, 4), num_res_blocks=1, norm_groups=8
    ),
    dit=DitConfig(
        width=256,
        depth=6,
        num_heads=4,
        num_kv_heads=2,
        patch_size=1,
        context_width=128,
        context_length=16,
    ),
    noise=Noise(prediction="v_prediction", betas="cosine"),
)
SIZES: dict[str, InlConfig] = {
    "S": _published(dit=DitConfig(width=384, depth=12, num_heads=6, num_kv_heads=2)),
    "B": _published(dit=DitConfig(width=768, depth=12, num_heads=12, num_kv_heads=4)),
    "L": _published(dit=DitConfig(width=1024, depth=24, num_heads=16, num_kv_heads=4)),
    "XL": _published(dit=DitConfig(width=1152, depth=28, num_heads=16, num_kv_heads=4)),
    "XXL": _published(dit=DitConfig(width=1536, depth=32, num_heads=24, num_kv_heads=6)),
    "L-MoE": _published(
        dit=DitConfig(width=1024, depth=24, num_heads=16, num_kv_heads=4, integrator="mixture")
    ),
    "XL-MoE": _published(
        dit=DitConfig(width=1152, depth=28, num_heads=16, num_kv_heads=4, integrator="mixture")
    ),
    "emoji": _EMOJI,
    "tiny": _TINY,
}
