"""Settings of one image of the family `next_scale`."""

import math
from dataclasses import dataclass, field

from nsp import values
from nsp.errors import ConfigError
from nsp.families.next_scale.config import NextScaleConfig
from nsp.family.order import Sampling

_LARGE = 1e6  # far from any use; beyond it float32 overflows


@dataclass(frozen=True, kw_only=True)
class NextScaleSampling(Sampling):
    """Settings of one image."""

    guidance_scale: float = field(default=2.0, metadata={"help": "Strength of guidance; 1 is off."})
    target_size: int | None = field(
        default=None,
        metadata={"help": "Side of the image in pixels; must be one of the model's scales."},
    )
    initial_size: int | None = field(
        default=None, metadata={"help": "Side that the model's first latent must have."}
    )
    scale_factor: int | None = field(
        default=None, metadata={"help": "Factor from scale to scale that the model must have."}
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.guidance_scale <= _LARGE:
            raise ConfigError(
                f"guidance_scale={self.guidance_scale} must be at least 0 and at most {_LARGE:g}; "
                "1.0 is off"
            )
        for name in ("target_size", "initial_size", "scale_factor"):
            if getattr(self, name) is not None:
                values.count(name, getattr(self, name))

    def last_scale(self, config: NextScaleConfig) -> int:
        """Return the scale whose image has the requested size; ConfigError if there is none."""
        for name in ("initial_size", "scale_factor"):
            wanted, has = getattr(self, name), getattr(config, name)
            if wanted not in (None, has):
                raise ConfigError(
                    f"{name}={wanted} is requested, but this model has {has}; omit it, or train "
                    "another model"
                )
        images = [side * config.vae.downsampling for side in config.sides]
        wanted = images[-1] if self.target_size is None else self.target_size
        if wanted not in images:
            nearest = sorted(images, key=lambda size: abs(math.log(size / wanted)))[:2]
            raise ConfigError(
                f"target_size={wanted} is requested, but this model makes images of "
                f"{', '.join(map(str, images))} px; nearest: {' or '.join(map(str, nearest))}"
            )
        return images.index(wanted)
