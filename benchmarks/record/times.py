"""Times as they were observed, and what is said of them: percentiles, and ratios with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nsp.config import Config

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Percentiles(Config):
    """Distribution of one duration, in ms."""

    count: int
    min: float
    p10: float
    p50: float
    p90: float
    p99: float
    max: float

    @property
    def spread(self) -> float:
        """Width from p10 to p90 over the median: how unsteady the machine was."""
        return (self.p90 - self.p10) / self.p50 if self.p50 else 0.0


def percentiles(values_ms: Sequence[float]) -> Percentiles:
    """Return the percentiles of one or more durations, interpolated linearly."""
    p10, p50, p90, p99 = (float(p) for p in np.percentile(values_ms, (10, 50, 90, 99)))
    return Percentiles(
        count=len(values_ms),
        min=float(min(values_ms)),
        p10=p10,
        p50=p50,
        p90=p90,
        p99=p99,
        max=float(max(values_ms)),
    )


@dataclass(frozen=True, kw_only=True)
class Observation(Config):
    """One batch of images by one contender."""

    contender: str
    round: int  # below 0: warm-up
    place: int  # in the round, from 0
    wall_ms: float  # from the prompts to the uint8 images
    stage_ms: dict[str, tuple[float, ...]]  # every call of every stage, in order
    # The steps alone, in a run of their own, if the calls of stages are unknown: a recorded loop
    # is one launch, and the program of a peer reports no stages.
    loop_ms: float | None = None

    @property
    def warmup(self) -> bool:
        """Whether it is kept out of the statistics."""
        return self.round < 0

    def stage_total_ms(self, stage: str) -> float:
        """Return the time of all calls of a stage."""
        return sum(self.stage_ms.get(stage, ()))

    @property
    def outside_ms(self) -> float:
        """Time outside the stages: the loop, tokenizer, uploads and downloads."""
        return self.wall_ms - sum(self.stage_total_ms(stage) for stage in self.stage_ms)


def whole(observation: Observation) -> float:
    """Return the time of the whole batch."""
    return observation.wall_ms


def measured_times(
    observations: Sequence[Observation],
    contender: str,
    of: Callable[[Observation], float] = whole,
) -> list[float]:
    """Return the measured times of a contender in ms, in order of the rounds."""
    found = [o for o in observations if o.contender == contender and not o.warmup]
    return [of(each) for each in sorted(found, key=lambda o: o.round)]


def median_ratio(base: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of medians, as tables show it, and its 95 % bootstrap interval over rounds.

    A round is drawn as a whole: what slowed everybody in it cancels.
    """
    before, after = np.asarray(base), np.asarray(times)
    count = min(len(before), len(after))
    picks = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    ratios = np.median(before[:count][picks], axis=1) / np.median(after[:count][picks], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = float(np.median(before) / np.median(after))
    return value, min(float(low), value), max(float(high), value)
