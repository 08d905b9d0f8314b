"""How tokens of the family `var` are drawn: settings, guidance over the scales, random numbers.

Every random number comes from a NumPy Philox stream keyed by the image's own seed, so an image does
not depend on the batch it is generated in or on the backend.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from nsp import values
from nsp.errors import ConfigError
from nsp.family.code_sampling import LARGE, CodeSampling
from nsp.family.order import stream


@dataclass(frozen=True, kw_only=True)
class VarSampling(CodeSampling):
    """Settings of one image."""

    guidance_scale: float = field(
        default=2.0, metadata={"help": "Strength of guidance; 1 is off."}
    )  # the published code's cfg c is 1 + c here
    guidance_schedule: Literal["ramp", "constant", "interval"] = field(
        default="ramp", metadata={"help": "How guidance changes over the scales."}
    )
    guidance_interval: tuple[float, ...] = field(
        default=(0.0, 1.0),
        metadata={"help": "Part of the schedule guided by `interval`, as two fractions."},
    )
    guidance_until: int | None = field(
        default=None,
        metadata={"help": "Number of guided scales; the later, largest ones then cost half."},
    )
    more_smooth: bool = field(default=False, metadata={"help": "Mix codes (Gumbel softmax)."})

    @property
    def greedy(self) -> str | None:
        """The setting that gives every seed the same image, in words; None if seeds matter."""
        return None if self.more_smooth else super().greedy

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not 0 <= self.guidance_scale <= LARGE:
            raise ConfigError(
                f"guidance_scale={self.guidance_scale} must be at least 0 and at most {LARGE:g}; "
                "1.0 is off"
            )
        low, high = self.guidance_interval if len(self.guidance_interval) == 2 else (1.0, 0.0)
        if not 0 <= low <= high <= 1:
            raise ConfigError(
                f"guidance_interval={values.shown(self.guidance_interval)} must be two fractions, "
                "0 <= from <= to <= 1"
            )
        if self.guidance_until is not None and self.guidance_until < 0:
            raise ConfigError(
                f"guidance_until={self.guidance_until} must be at least 0, the number of scales "
                "with guidance; omit it for all"
            )
        if self.guidance_schedule != "interval" and (low, high) != (0, 1):
            raise ConfigError(
                f"guidance_interval={self.guidance_interval} has no effect with guidance_schedule="
                f"{self.guidance_schedule}; choose the schedule interval, or omit it"
            )

    def changed(self, settings: Mapping[str, Any], *, beside: tuple[str, ...] = ()) -> Self:
        """Return these settings with some replaced; ConfigError for a wrong one.

        If another schedule is chosen, an interval of these settings is removed.
        """
        schedule = settings.get("guidance_schedule")
        if isinstance(schedule, str) and schedule != "interval":
            settings = {"guidance_interval": (0.0, 1.0), **settings}
        return super().changed(settings, beside=beside)

    def guidance_per_scale(self, num_scales: int) -> list[float]:
        """Return the guidance of every scale.

        "ramp" grows linearly from 1 (off) at the first scale to `guidance_scale` at the last, as
        the published code does; "interval" applies it where the scale's ratio s/(S-1) lies in
        `guidance_interval`, 1 elsewhere (Kynkäänniemi et al. 2024, arXiv:2404.07724, with scales
        for noise levels). From scale `guidance_until` on it is 1: the null condition's half of the
        work is then left out.
        """
        ratios = scale_ratios(num_scales)
        low, high = self.guidance_interval
        if self.guidance_schedule == "ramp":
            values = [1 + (self.guidance_scale - 1) * ratio for ratio in ratios]
        elif self.guidance_schedule == "constant":
            values = [self.guidance_scale] * num_scales
        else:
            values = [self.guidance_scale if low <= ratio <= high else 1.0 for ratio in ratios]
        until = num_scales if self.guidance_until is None else self.guidance_until
        until = min(until, num_scales)
        return [*values[:until], *[1.0] * (num_scales - until)]


def scale_ratios(num_scales: int) -> list[float]:
    """Return s / (S - 1) for every scale; [0.0] for a single one."""
    return [scale / max(num_scales - 1, 1) for scale in range(num_scales)]


def draw_gumbel(seed: int, num_tokens: int, vocab_size: int) -> NDArray[np.float32]:
    """Return standard Gumbel noise (L, V) of one image, from a stream apart from the uniforms'."""
    uniform = stream(seed, purpose=1).random((num_tokens, vocab_size), np.float32)
    uniform = np.maximum(uniform, np.finfo(np.float32).tiny)
    noise: NDArray[np.float32] = np.minimum(-np.log(-np.log(uniform)), np.float32(50))
    return noise
