"""What `nsp bench` is asked to measure, and how much of it."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nsp.benchmarks.contest.contenders import check_name
from nsp.benchmarks.contest.rounds import Stability
from nsp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure. None where the benchmark decides."""

    engine_dir: Path
    output_dir: Path
    checkpoint: Path | None = None  # of the baseline; None: where the manifest says
    backend: str = "auto"
    precision: str | None = None  # of the engines; None: what suits the device
    quick: bool = False
    batch_sizes: tuple[int, ...] = (1, 4)
    rounds: int | None = None
    warmup: int | None = None
    seed: int = 0
    threads: int | None = None  # None: see `nsp.cores`
    contenders: tuple[str, ...] | None = None  # beside the engines; None: all, or none when quick
    peer: Path | None = None  # a clone of the public code that the family declares as a peer
    sweep: bool = False  # batch sizes, threads and guidance ended early, for the plots

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in self.contenders or ():
            check_name(name)
        # Times are identified by name alone: two of one name would be counted as one.
        counted = Counter(self.contenders or ())
        if twice := [name for name, count in counted.items() if count > 1]:
            raise ConfigError(f"contender {twice[0]!r} is given twice; give it once")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch sizes {list(self.batch_sizes)} must be positive numbers")
        for name, least in (("rounds", 1), ("warmup", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured."""

    rounds: int
    warmup: int
    seconds_per_batch: float  # no further round starts after this
    engine_processes: int
    baseline_processes: int
    gemm_side: int
    num_conditions: int  # for parity
    sweep_rounds: int
    sweep_seconds: float  # no further round of a point starts after this
    stability: Stability | None = None  # ends a measurement before all rounds are done

    @classmethod
    def of(cls, options: BenchOptions) -> Self:
        """Return a minute's work (small model) for `quick`, else what a 99th percentile needs."""
        effort = QUICK if options.quick else FULL
        given = {"rounds": options.rounds, "warmup": options.warmup}
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(**{**effort, **chosen})


QUICK: dict[str, Any] = {
    "rounds": 12,
    "warmup": 1,
    "seconds_per_batch": 8.0,
    "engine_processes": 2,
    "baseline_processes": 1,
    "gemm_side": 1024,
    "num_conditions": 4,
    "sweep_rounds": 5,
    "sweep_seconds": 8.0,
    "stability": Stability(window=4, tolerance=0.02),
}
FULL: dict[str, Any] = {
    "rounds": 100,
    "warmup": 3,
    "seconds_per_batch": 180.0,  # with half a second an image the whole takes ten minutes
    "engine_processes": 5,
    "baseline_processes": 3,
    "gemm_side": 2048,
    "num_conditions": 8,
    "sweep_rounds": 20,
    "sweep_seconds": 60.0,
    "stability": Stability(window=20, tolerance=0.01),
}


def plain(record: BenchOptions | Effort) -> dict[str, Any]:
    """Return the fields, JSON-ready."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {
        name: value.name  # results are published: no folders of this machine
        if isinstance(value, Path)
        else dataclasses.asdict(value)
        if isinstance(value, Stability)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in values.items()
    }
