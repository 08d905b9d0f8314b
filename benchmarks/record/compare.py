"""`nsp bench compare OLD NEW`: whether the engines became slower, and how sure that is.

Both results keep raw observations, taken in rounds of one contender after the other. The PyTorch
baseline of a round tells how fast the machine was at that moment, so where both results have the
same baseline software, what is compared is the engines' time in units of it; else plain times.
Intervals are those of the bootstrap over rounds (Efron & Tibshirani 1993, percentile method).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nsp.benchmarks.record.result import BatchResult, BenchResult
from nsp.benchmarks.record.times import Observation
from nsp.config import Config
from nsp.errors import ConfigError

RESAMPLES = 4000
CONFIDENCE = 0.95
FEWEST_ROUNDS = 5

Floats = NDArray[np.float64]
Verdict = Literal["same", "faster", "slower", "unclear"]


@dataclass(frozen=True, kw_only=True)
class Ratio(Config):
    """New over old: above 1 is slower. `low` to `high` holds it with 95 % confidence."""

    value: float
    low: float
    high: float

    def verdict(self, threshold: float) -> Verdict:
        """Return what to make of it when changes up to `threshold` do not matter.

        "unclear" is a change beyond the threshold that chance alone could have made.
        """
        if self.value > 1 + threshold:
            return "slower" if self.low > 1 else "unclear"
        if self.value < 1 / (1 + threshold):
            return "faster" if self.high < 1 else "unclear"
        return "same"

    def __str__(self) -> str:
        """Return it as tables show it."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class BatchChange(Config):
    """How one batch size changed."""

    batch: int
    adjusted: bool  # `gate` is in units of the baseline's time of the same run
    gate: Ratio  # what is judged: whole batches of the engines
    plain: Ratio  # the same in milliseconds
    baseline: Ratio | None  # how the baseline changed: the machine's own change
    stages: dict[str, Ratio]  # of the engines, in milliseconds


@dataclass(frozen=True, kw_only=True)
class Comparison(Config):
    """Everything two results tell about a change."""

    threshold: float
    batches: tuple[BatchChange, ...]
    trusted: bool  # whether both results are
    notes: tuple[str, ...] = field(default_factory=tuple)  # what differs and may

    @property
    def verdicts(self) -> dict[int, Verdict]:
        """What to make of every batch size."""
        return {each.batch: each.gate.verdict(self.threshold) for each in self.batches}

    @property
    def slower(self) -> list[int]:
        """Batch sizes that became slower by more than the threshold."""
        return [batch for batch, verdict in self.verdicts.items() if verdict == "slower"]


def compare_results(
    old: BenchResult, new: BenchResult, *, threshold: float, anyway: bool = False
) -> Comparison:
    """Return how `new` differs from `old`; `threshold` is a share, 0.05 for 5 %.

    Raises ConfigError when one cannot be trusted, unless `anyway`; when they measured different
    things, naming each; when they share no batch size or one has fewer than five rounds.
    """
    for name, result in (("old", old), ("new", new)):
        if not (result.trusted or anyway):
            first, *more = result.warnings or ("it does not say why",)
            others = f", and {len(more)} more reasons" if more else ""
            raise ConfigError(
                f"the {name} result cannot be trusted: {first}{others}; measure again, or compare "
                "them with --anyway"
            )
    _check_contracts(old, new)
    before = {each.batch: each for each in old.batches}
    shared = [(before[each.batch], each) for each in new.batches if each.batch in before]
    if not shared:
        sizes = [[each.batch for each in result.batches] for result in (old, new)]
        raise ConfigError(f"no batch size was measured in both: {sizes[0]} and {sizes[1]}")
    adjusted = _same_baseline(old, new)
    return Comparison(
        threshold=threshold,
        batches=tuple(_change(old, new, a, b, adjusted=adjusted) for a, b in shared),
        trusted=old.trusted and new.trusted,
        notes=tuple(_notes(old, new, adjusted=adjusted)),
    )


def _check_contracts(old: BenchResult, new: BenchResult) -> None:
    for name, result in (("old", old), ("new", new)):
        if result.contract is None:
            raise ConfigError(
                f"the {name} result does not record exactly what was measured, as schema 1 did "
                "not; run nsp bench again"
            )
        for batch in result.batches:
            if batch.rounds < FEWEST_ROUNDS:
                raise ConfigError(
                    f"the {name} result has {batch.rounds} rounds of batch {batch.batch}, but an "
                    f"interval needs {FEWEST_ROUNDS}; run nsp bench with more --rounds"
                )
    assert old.contract is not None
    assert new.contract is not None
    if differing := list(old.contract.differences(new.contract)):
        raise ConfigError(
            f"these results measured different things: {'; '.join(differing)}; "
            "measure both the same way"
        )


def _same_baseline(old: BenchResult, new: BenchResult) -> bool:
    """Return whether the baselines are the same software, so that it measures the machine."""
    versions = [result.environment.packages.get("torch") for result in (old, new)]
    return old.baseline is not None and old.baseline == new.baseline and len(set(versions)) == 1


def _change(
    old: BenchResult, new: BenchResult, before: BatchResult, after: BatchResult, *, adjusted: bool
) -> BatchChange:
    rng = np.random.default_rng(0)
    ours, theirs = before.times(old.contender), after.times(new.contender)
    plain = _ratio(rng, [ours], [theirs])
    baseline = None
    gate = plain
    if adjusted:
        assert old.baseline is not None
        base_before, base_after = before.times(old.baseline), after.times(old.baseline)
        baseline = _ratio(rng, [base_before], [base_after])
        gate = _ratio(rng, [ours, base_before], [theirs, base_after])
    stages = {
        name: _ratio(rng, [before.times(old.contender, of)], [after.times(new.contender, of)])
        for name, of in _stages(before, after)
    }
    return BatchChange(
        batch=after.batch,
        adjusted=adjusted,
        gate=gate,
        plain=plain,
        baseline=baseline,
        stages=stages,
    )


def _stages(
    before: BatchResult, after: BatchResult
) -> Iterator[tuple[str, Callable[[Observation], float]]]:
    """Yield the stages of both, with how an observation tells their time."""
    for row in after.stage_rows:
        if row.name in [each.name for each in before.rows]:
            yield row.name, partial(_stage_ms, stage=row.name)


def _stage_ms(observation: Observation, *, stage: str) -> float:
    return observation.stage_total_ms(stage)


def _ratio(rng: np.random.Generator, old: list[list[float]], new: list[list[float]]) -> Ratio:
    """Return new over old of medians; with two series each, of the first in units of the second.

    The series of one result are resampled together: a round is one draw.
    """
    samples = _level(rng, new) / _level(rng, old)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    value = np.median(_values(new)) / np.median(_values(old))
    return Ratio(value=float(value), low=float(min(low, value)), high=float(max(high, value)))


def _values(series: list[list[float]]) -> Floats:
    """Return the level of every round."""
    first = np.array(series[0], np.float64)
    return first if len(series) == 1 else first / np.array(series[1], np.float64)


def _level(rng: np.random.Generator, series: list[list[float]]) -> Floats:
    """Return the level of every resample."""
    values = _values(series)
    picks = rng.integers(0, len(values), (RESAMPLES, len(values)))
    levels: Floats = np.median(values[picks], axis=1)
    return levels


def _notes(old: BenchResult, new: BenchResult, *, adjusted: bool) -> Iterator[str]:
    """Yield what differs and may: the software, the precision, how calm the machine was."""
    sizes = [{batch.batch for batch in result.batches} for result in (old, new)]
    for batch in sorted(sizes[0] ^ sizes[1]):
        yield f"batch {batch} is in only one result and is not compared"
    for name, before, after in (
        ("backend", old.model.backend, new.model.backend),
        ("precision", old.model.precision, new.model.precision),
        ("cache layout", old.model.kv_layout, new.model.kv_layout),
    ):
        if before != after:
            yield f"{name}: {before}, now {after}"
    packages = old.environment.packages, new.environment.packages
    for name in sorted(packages[0].keys() | packages[1].keys()):
        versions = [each.get(name, "absent") for each in packages]
        if versions[0] != versions[1]:
            yield f"{name}: {versions[0]}, now {versions[1]}"
    if not adjusted:
        yield "no common PyTorch baseline: changes of the machine's own speed are included"
    for name, result in (("old", old), ("new", new)):
        for warning in result.warnings:
            yield f"{name} result: {warning}"


def parse_threshold(text: str) -> float:
    """Return the fraction that "5%" or "0.05" means; raise ConfigError for anything else."""
    number = text.strip().removesuffix("%").strip()
    try:
        value = float(number) / (100 if "%" in text else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ConfigError(f"threshold {text!r} must be a fraction below 100 %, like 5% or 0.05")
    return value
