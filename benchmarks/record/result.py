"""What a benchmark found, as records: the content of bench.json.

Rows are computed from raw observations and counted work; nothing here runs a model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from nsp.benchmarks.ceilings.cpu import Ceilings, Environment
from nsp.benchmarks.contest.cold import ColdRun
from nsp.benchmarks.contest.parity import Parity
from nsp.benchmarks.contest.rounds import Observation, Percentiles, StageCall, percentiles
from nsp.benchmarks.contest.scenarios import Scenario
from nsp.benchmarks.flops import TextEncoderSize, stage_work
from nsp.benchmarks.record.contract import Contract
from nsp.config import Config
from nsp.errors import ConfigError
from nsp.files import read_json
from nsp.stage.io import StageIO

SCHEMA = 3
# 1 has no contract, no rivals and no sweep; 2 no footprint and no guidance ended early, and its
# `imported_mib` leaves out the backend's library.
READABLE = (1, 2, 3)
OUTSIDE = "outside stages"
END_TO_END = "end to end"
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1}


class Rates(Protocol):
    """The most a machine was seen to do, a CPU or a GPU."""

    @property
    def gemm_peak_gflops(self) -> float:
        """Ceiling of compute."""

    @property
    def bandwidth_gb_s(self) -> float:
        """Ceiling of memory traffic, read plus written."""


@dataclass(frozen=True, kw_only=True)
class Cost(Config):
    """What a part of generating has to do, whoever does it."""

    gflop: float
    mib: float  # weights, inputs and outputs, each moved once per call

    def roof_ms(self, ceilings: Rates) -> float:
        """Return the time the operations take at the measured GEMM peak."""
        return 1e3 * self.gflop / ceilings.gemm_peak_gflops

    def memory_ms(self, ceilings: Rates) -> float:
        """Return the time the bytes take at the measured bandwidth; caches can be faster."""
        return 1e3 * self.mib * 2**20 / (1e9 * ceilings.bandwidth_gb_s)


@dataclass(frozen=True, kw_only=True)
class Row(Config):
    """One part of generating a batch: a stage, one scale of a stage, what is outside, or all."""

    name: str
    calls: int
    candidate: Percentiles
    baseline: Percentiles | None
    cost: Cost | None  # None: not counted for this family or stage

    @property
    def speedup(self) -> float | None:
        """Median of the baseline over the median of the candidate."""
        if self.baseline is None:
            return None
        return self.baseline.p50 / self.candidate.p50

    def of_roof(self, ceilings: Ceilings | None) -> float | None:
        """Return the fraction of the GEMM peak that the median reaches, None where unknown."""
        if ceilings is None or self.cost is None or not self.cost.gflop:
            return None
        return self.cost.roof_ms(ceilings) / self.candidate.p50


Stopped = Literal["rounds", "stable", "time"]  # all rounds done, medians at rest, time is up


def measured_times(
    observations: Sequence[Observation],
    contestant: str,
    of: Callable[[Observation], float] = lambda o: o.wall_ms,
) -> list[float]:
    """Return the measured times of a contestant in ms, in order of the rounds."""
    found = [o for o in observations if o.contestant == contestant and not o.warmup]
    return [of(each) for each in sorted(found, key=lambda o: o.round)]


@dataclass(frozen=True, kw_only=True)
class Entry(Config):
    """A contestant beyond the two that are compared in every table."""

    name: str
    what: str  # in words
    prepare_s: float | None = None  # compiling or exporting, the first images included
    missing: str | None = None  # why it was not timed


@dataclass(frozen=True, kw_only=True)
class SweepPoint(Config):
    """Raw times of one scenario of the sweep over batch sizes and threads."""

    scenario: Scenario
    observations: tuple[Observation, ...]

    def times(
        self, contestant: str, of: Callable[[Observation], float] = lambda o: o.wall_ms
    ) -> list[float]:
        """Return the measured times of a contestant in ms, in order of the rounds."""
        return measured_times(self.observations, contestant, of)


@dataclass(frozen=True, kw_only=True)
class Footprint(Config):
    """Memory that one image must take, counted and not measured."""

    weights_mib: float
    arena_mib: float
    scratch_mib: float

    @property
    def total_mib(self) -> float:
        """All of it."""
        return self.weights_mib + self.arena_mib + self.scratch_mib


@dataclass(frozen=True, kw_only=True)
class GuidancePoint(Config):
    """Guidance on the first scales only, compared with guidance on all of them."""

    guided_scales: int
    times_ms: tuple[float, ...]  # of single images, in order of the rounds
    token_agreement: float  # share of all sampled tokens that stay the same
    psnr_db: tuple[float | None, ...]  # of every picture; None: equal


@dataclass(frozen=True, kw_only=True)
class BatchResult(Config):
    """Everything measured with one batch size."""

    batch: int
    rounds: int  # measured; warm-up is apart
    rows: tuple[Row, ...]  # stages in order, what is outside them, end to end
    scale_rows: tuple[Row, ...]  # the `step` stage, scale by scale
    observations: tuple[Observation, ...]  # raw, warm-up included
    stopped: Stopped = "rounds"  # what ended it

    def times(
        self, contestant: str, of: Callable[[Observation], float] = lambda o: o.wall_ms
    ) -> list[float]:
        """Return the measured times of a contestant in ms, in order of the rounds."""
        return measured_times(self.observations, contestant, of)

    @property
    def end_to_end(self) -> Row:
        """The row of whole batches."""
        return self.rows[-1]

    @property
    def images_per_s(self) -> float:
        """Throughput of the candidate at its median."""
        return 1e3 * self.batch / self.end_to_end.candidate.p50

    @property
    def baseline_images_per_s(self) -> float | None:
        """Throughput of the baseline at its median."""
        baseline = self.end_to_end.baseline
        return None if baseline is None else 1e3 * self.batch / baseline.p50


@dataclass(frozen=True, kw_only=True)
class Model(Config):
    """What was run."""

    family: str
    model_hash: str
    backend: str
    device: str  # of the candidate and of the baseline
    precision: str
    kv_dtype: str
    kv_layout: str
    schedule: tuple[int, ...]  # grid side of every scale
    num_tokens: int
    image_size_px: int
    sampling: dict[str, Any]
    weights_mib: dict[str, float]  # on disk, per contestant

    @property
    def schedule_words(self) -> str:
        """How many tokens or values of latents there are, and on how many grids."""
        grids = len(self.schedule)
        return f"{self.num_tokens} tokens" + (f" in {grids} scale steps" if grids > 1 else "")


@dataclass(frozen=True, kw_only=True)
class BenchResult(Config):
    """The content of bench.json."""

    schema_version: int
    created: str  # UTC, ISO 8601
    seconds: float  # the whole benchmark
    options: dict[str, Any]
    environment: Environment
    ceilings: Ceilings | None  # of the CPU; None for engines on another device
    model: Model
    candidate: str
    baseline: str | None
    baseline_missing: str | None  # why there is none
    other_work_cores: float | None  # kept busy by other processes during the rounds, on average
    batches: tuple[BatchResult, ...]
    parity: Parity | None
    cold_runs: tuple[ColdRun, ...]
    warnings: tuple[str, ...]
    contract: Contract | None = None  # None in schema 1
    rivals: tuple[Entry, ...] = ()
    sweep: tuple[SweepPoint, ...] = ()
    guidance: tuple[GuidancePoint, ...] = ()  # all scales first
    footprint: Footprint | None = None  # of the candidate; None: not counted for this family

    def __post_init__(self) -> None:
        """Check the schema."""
        if self.schema_version not in READABLE:
            raise ConfigError(
                f"the benchmark result has schema_version {self.schema_version}, "
                f"but this nsp reads {' and '.join(map(str, READABLE))}; run: nsp bench"
            )

    @property
    def contestants(self) -> tuple[str, ...]:
        """Names of all that were timed: candidate, baseline, rivals."""
        timed = [entry.name for entry in self.rivals if entry.missing is None]
        return (self.candidate, *((self.baseline,) if self.baseline else ()), *timed)


def read_result(path: Path) -> BenchResult:
    """Return the result in a bench.json; raise ConfigError naming the file and what is wrong."""
    try:
        return BenchResult.from_dict(read_json(path))
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{path} is not a benchmark result ({error})") from error


@dataclass(frozen=True)
class CallCost:
    """The work of one stage call."""

    stage: str
    cost: Cost | None


def call_costs(
    calls: Sequence[StageCall],
    stages_io: Mapping[str, StageIO],
    *,
    family: str,
    config: Any,
    weight_dtype: str,
    text_encoder: TextEncoderSize | None,
) -> list[CallCost]:
    """Return the cost of every stage call of one `generate`, in order."""
    costs = []
    for call in calls:
        work = stage_work(family, config, call.stage, call.sizes, text_encoder)
        cost = None
        if work is not None:
            weights = work.weights * _DTYPE_BYTES[weight_dtype]
            moved = weights + _tensor_bytes(stages_io[call.stage], call.sizes)
            cost = Cost(gflop=1e-9 * work.flops, mib=moved / 2**20)
        costs.append(CallCost(call.stage, cost))
    return costs


def _tensor_bytes(io: StageIO, sizes: Mapping[str, int]) -> int:
    """Return the bytes of all inputs and outputs of a call."""
    total = 0
    for spec in (*io.inputs.values(), *io.outputs.values()):
        count = _DTYPE_BYTES[spec.dtype]
        for size in spec.shape(sizes):
            count *= size
        total += count
    return total


def batch_result(
    observations: Sequence[Observation],
    costs: Sequence[CallCost],
    *,
    batch: int,
    candidate: str,
    baseline: str | None,
    scale_names: Sequence[str],
    stopped: Stopped = "rounds",
) -> BatchResult:
    """Return the rows of one batch size; observations of warm-up rounds are only kept."""
    measured = [each for each in observations if not each.warmup]
    ours = [each for each in measured if each.contestant == candidate]
    theirs = [each for each in measured if each.contestant == baseline]

    def row(
        name: str, of: Callable[[Observation], float], calls: int, parts: Sequence[CallCost]
    ) -> Row:
        return Row(
            name=name,
            calls=calls,
            candidate=percentiles([of(each) for each in ours]),
            baseline=percentiles([of(each) for each in theirs]) if theirs else None,
            cost=_total(parts),
        )

    rows = []
    for stage in dict.fromkeys(each.stage for each in costs):
        parts = [each for each in costs if each.stage == stage]
        rows.append(row(stage, _stage_total(stage), len(parts), parts))
    rows.append(row(OUTSIDE, lambda o: o.outside_ms, 1, ()))
    rows.append(row(END_TO_END, lambda o: o.wall_ms, 1, costs))
    steps = [each for each in costs if each.stage == "step"]
    scale_rows = []
    if len(steps) == len(scale_names):
        for index, (name, part) in enumerate(zip(scale_names, steps, strict=True)):
            scale_rows.append(row(name, _step_call(index), 1, [part]))
    return BatchResult(
        batch=batch,
        rounds=len(ours),
        rows=tuple(rows),
        scale_rows=tuple(scale_rows),
        observations=tuple(observations),
        stopped=stopped,
    )


def _stage_total(stage: str) -> Callable[[Observation], float]:
    return lambda observation: observation.stage_total_ms(stage)


def _step_call(index: int) -> Callable[[Observation], float]:
    return lambda observation: observation.stage_ms["step"][index]


def _total(parts: Sequence[CallCost]) -> Cost | None:
    """Return the sum of all costs; None when there are none or one is unknown."""
    costs = [each.cost for each in parts]
    known = [cost for cost in costs if cost is not None]
    if not known or len(known) < len(costs):
        return None
    return Cost(gflop=sum(c.gflop for c in known), mib=sum(c.mib for c in known))
