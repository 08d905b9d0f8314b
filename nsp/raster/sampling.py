"""Settings of one image whose codes are drawn in raster order."""

from dataclasses import dataclass, field

from nsp.errors import ConfigError
from nsp.family.code_sampling import LARGE, CodeSampling


@dataclass(frozen=True, kw_only=True)
class RasterSampling(CodeSampling):
    """Settings of one image."""

    guidance_scale: float = field(
        default=2.0,
        metadata={"help": "Strength of guidance; 1 is off.", "spelled": ("--cfg-scale",)},
    )
    # Counted as by the public code (autoregressive/models/generate.py): decoding step i draws code
    # i + 1, and is guided up to this one.
    cfg_interval: int = field(
        default=-1,
        metadata={"help": "Codes 0 to this number plus one are guided, the others not; -1: all."},
    )

    # 0 is greedy, as programs of such models have it. It becomes top_k=1 once, here: no stage
    # divides by 0, and records of pictures have one name for it.
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits; lower is less random, 0 is greedy."}
    )

    def __post_init__(self) -> None:
        """Check the ranges; temperature 0 becomes top_k=1."""
        if self.temperature == 0:
            object.__setattr__(self, "temperature", 1.0)
            object.__setattr__(self, "top_k", 1)
        super().__post_init__()
        if not 0 <= self.guidance_scale <= LARGE:
            raise ConfigError(
                f"guidance_scale={self.guidance_scale} must be at least 0 and at most {LARGE:g}; "
                "1.0 is off"
            )
        if self.cfg_interval < -1:
            raise ConfigError(
                f"cfg_interval={self.cfg_interval} must be at least -1; -1 guides every code"
            )

    def num_guided(self, num_codes: int) -> int:
        """Return how many codes are guided, counted from the first; ConfigError beyond the last."""
        if self.cfg_interval > num_codes - 2:
            raise ConfigError(
                f"cfg_interval={self.cfg_interval} is outside the sequence of {num_codes} codes; "
                f"at most {num_codes - 2} is possible, -1 guides every code"
            )
        if self.guidance_scale == 1:
            return 0
        return num_codes if self.cfg_interval < 0 else self.cfg_interval + 2
