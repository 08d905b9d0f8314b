"""Settings of one image of the family `inl_diffusion`."""

from dataclasses import dataclass, field
from typing import cast

from nsp import values
from nsp.diffusion.noise import Noise
from nsp.diffusion.samplers import SAMPLERS, Sampler, Table, table
from nsp.errors import ConfigError
from nsp.families.inl_diffusion.config import InlConfig
from nsp.family.order import Sampling

_LARGE = 1e6  # far from any use; beyond it float32 overflows
_MOST_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class InlSampling(Sampling):
    """Settings of one image."""

    num_inference_steps: int = field(
        default=50,
        metadata={"help": "Steps from noise to picture.", "spelled": ("--steps",)},
    )
    sampler: str = field(default="ddim", metadata={"help": f"One of {', '.join(SAMPLERS)}."})
    eta: float = field(default=0.0, metadata={"help": "DDIM's share of random noise, 0 to 1."})
    guidance_scale: float = field(default=7.5, metadata={"help": "Strength of guidance; 1 is off."})
    guidance_rescale: float = field(
        default=0.0,
        metadata={"help": "How much the guided prediction's spread goes back to the plain one's."},
    )
    guidance_start: float = field(
        default=0.0, metadata={"help": "Share of the steps before guidance begins."}
    )
    guidance_end: float = field(
        default=1.0, metadata={"help": "Share of the steps after which guidance ends."}
    )
    size: int | None = field(
        default=None, metadata={"help": "Side of the picture in pixels, one of the model's."}
    )
    strength: float = field(
        default=1.0, metadata={"help": "How much of --init-image is changed, above 0 to 1."}
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        values.integer("num_inference_steps", self.num_inference_steps, least=1, most=_MOST_STEPS)
        values.choice("sampler", self.sampler, SAMPLERS)
        for name in ("eta", "guidance_rescale", "guidance_start", "guidance_end", "strength"):
            values.real(name, getattr(self, name), least=0, most=1)
        values.real("guidance_scale", self.guidance_scale, least=0, most=_LARGE)
        if self.size is not None:
            values.count("size", self.size)
        if self.strength == 0:
            raise ConfigError("strength must be above 0: with 0 nothing is drawn")
        if self.guidance_start >= self.guidance_end:
            raise ConfigError(
                f"guidance_start={self.guidance_start:g} must be below "
                f"guidance_end={self.guidance_end:g}; guidance_scale=1 turns guidance off"
            )

    def side(self, config: InlConfig) -> int:
        """Return the side of the latent; ConfigError for a size that the model does not have."""
        sizes = [side * config.vae.downsampling for side in config.sides]
        if self.size is None:
            return config.latent_side
        if self.size not in sizes:
            raise ConfigError(
                f"size={self.size} is requested, but this model makes pictures of "
                f"{', '.join(map(str, sizes))} px"
            )
        return config.sides[sizes.index(self.size)]

    @property
    def is_guided(self) -> bool:
        """Whether the null condition is computed at all."""
        return self.guidance_scale != 1

    def table(self, noise: Noise) -> Table:
        """Return the steps of the image; ConfigError if the sampler cannot make them."""
        return table(
            noise,
            cast("Sampler", self.sampler),
            self.num_inference_steps,
            eta=self.eta,
            strength=self.strength,
        )

    def guidance(self, num_steps: int) -> list[float]:
        """Return the strength of guidance at every step; 1 outside of its interval."""
        steps = (step / num_steps for step in range(num_steps))
        return [
            self.guidance_scale if self.guidance_start <= share < self.guidance_end else 1.0
            for share in steps
        ]
