"""What a benchmark found, as records: the content of bench.json. Nothing here runs a model."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from nsp.benchmarks.ceilings.rates import Ceilings
from nsp.benchmarks.record.cold import ColdRun
from nsp.benchmarks.record.contract import Contract
from nsp.benchmarks.record.environment import Environment
from nsp.benchmarks.record.parity import Parity
from nsp.benchmarks.record.schema import check_schema
from nsp.benchmarks.record.times import Observation, Percentiles, measured_times, whole
from nsp.config import Config
from nsp.errors import ConfigError
from nsp.files import read_json

JSON_NAME = "bench.json"  # in the folder of a benchmark
OUTSIDE = "outside stages"
END_TO_END = "end to end"
LOOP = "all steps"


@dataclass(frozen=True, kw_only=True)
class Cost(Config):
    """What a part of generating has to do, whoever does it."""

    gflop: float
    mib: float  # weights, inputs and outputs, each moved once per call

    def __add__(self, other: Self) -> "Cost":
        """Return both together."""
        return Cost(gflop=self.gflop + other.gflop, mib=self.mib + other.mib)

    def roof_ms(self, ceilings: Ceilings) -> float:
        """Return the time the operations take at the measured GEMM peak."""
        return 1e3 * self.gflop / ceilings.gemm_peak_gflops

    def memory_ms(self, ceilings: Ceilings) -> float:
        """Return the time the bytes take at the measured bandwidth; caches can be faster."""
        return 1e3 * self.mib * 2**20 / (1e9 * ceilings.bandwidth_gb_s)


@dataclass(frozen=True, kw_only=True)
class Part(Config):
    """One part of generating a batch: some steps of the loop, or a stage before or after it."""

    name: str
    unit: str | None  # of the steps; None: outside the loop
    calls: dict[str, tuple[int, int]]  # stage -> its first call here, and the one after the last
    costs: dict[str, Cost]  # of the stages whose work is counted

    def ms(self, observation: Observation) -> float:
        """Return the time of all its calls."""
        found = observation.stage_ms
        return sum(sum(found.get(stage, ())[a:b]) for stage, (a, b) in self.calls.items())

    @property
    def cost(self) -> Cost | None:
        """The work of all its stages, None where that of one is not counted."""
        return total(self.costs.get(stage) for stage in self.calls)


def total(costs: Iterator[Cost | None]) -> Cost | None:
    """Return the sum of all costs; None when there are none or one is unknown."""
    added: Cost | None = None
    for cost in costs:
        if cost is None:
            return None
        added = cost if added is None else added + cost
    return added


@dataclass(frozen=True, kw_only=True)
class Row(Config):
    """One line of a table: a stage, some steps of the loop, what is outside stages, or all."""

    name: str
    calls: int
    contender: Percentiles
    baseline: Percentiles | None
    cost: Cost | None  # None: not counted for this model or stage

    @property
    def speedup(self) -> float | None:
        """Median of the baseline over the median of the contender."""
        if self.baseline is None or not self.contender.p50:
            return None
        return self.baseline.p50 / self.contender.p50

    def of_roof(self, ceilings: Ceilings | None) -> float | None:
        """Return the fraction of the GEMM peak that the median reaches, None where unknown."""
        if ceilings is None or self.cost is None or not self.cost.gflop:
            return None
        return self.cost.roof_ms(ceilings) / self.contender.p50


Stopped = Literal["rounds", "stable", "time"]  # all rounds done, medians at rest, time is up


@dataclass(frozen=True, kw_only=True)
class Entry(Config):
    """A contender beside the one that every table is about and the baseline."""

    name: str
    what: str  # in words
    prepare_s: float | None = None  # compiling or exporting, the first images included
    missing: str | None = None  # why it was not timed
    # How closely it computes what the baseline computes; None: not compared.
    token_agreement: float | None = None
    max_relative_error: float | None = None
    psnr_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scenario(Config):
    """One workload: so many images at once on so many threads, other settings being the model's."""

    name: str
    batch: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class SweepPoint(Config):
    """Raw times of one scenario of the sweep over batch sizes and threads."""

    scenario: Scenario
    observations: tuple[Observation, ...]

    def times(self, contender: str) -> list[float]:
        """Return the measured times of a contender in ms, in order of the rounds."""
        return measured_times(self.observations, contender)


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
    parts: tuple[Part, ...]  # in order: what is before the loop, its steps, what is after it
    step_rows: tuple[Row, ...]  # of the parts that are steps
    loop: Row | None  # all steps; None: their calls are unknown
    observations: tuple[Observation, ...]  # raw, warm-up included
    stopped: Stopped = "rounds"  # what ended it

    def times(self, contender: str, of: Callable[[Observation], float] = whole) -> list[float]:
        """Return the measured times of a contender in ms, in order of the rounds."""
        return measured_times(self.observations, contender, of)

    def loop_ms(self, observation: Observation) -> float:
        """Return the time of all steps; 0 if the calls are unknown."""
        return loop_ms(self.parts, observation)

    @property
    def end_to_end(self) -> Row:
        """The row of whole batches."""
        return self.rows[-1]

    @property
    def stage_rows(self) -> tuple[Row, ...]:
        """The rows of stages."""
        return self.rows[:-2]

    @property
    def images_per_s(self) -> float:
        """Throughput of the contender at its median."""
        return 1e3 * self.batch / self.end_to_end.contender.p50

    @property
    def baseline_images_per_s(self) -> float | None:
        """Throughput of the baseline at its median."""
        baseline = self.end_to_end.baseline
        return None if baseline is None else 1e3 * self.batch / baseline.p50

    def floor_ms(self, ceilings: Ceilings, num_layers: int) -> float:
        """Return the least time of all steps: work or bytes, whichever is longer, and launches."""
        steps = [part for part in self.parts if part.unit]
        work = sum(
            max(cost.roof_ms(ceilings), cost.memory_ms(ceilings))
            for part in steps
            for cost in part.costs.values()
        )
        return work + ceilings.launch_ms(num_layers * len(steps))

    def token_mib(self, model: "Model") -> float | None:
        """Return the weights that every token reads; None for a model of several tokens a step.

        They are those of the stage that is called for each token but the first, which may follow
        from a prefix.
        """
        calls: Counter[str] = Counter()
        for part in (each for each in self.parts if each.unit):
            calls.update({stage: stop - start for stage, (start, stop) in part.calls.items()})
        each_token = [n for n, count in calls.items() if count >= max(2, model.num_tokens - 1)]
        return max((model.read_mib.get(name, 0) for name in each_token), default=0) or None


def loop_ms(parts: tuple[Part, ...], observation: Observation) -> float:
    """Return the time of all steps of an observation; 0 if the calls are unknown."""
    if observation.loop_ms is not None:
        return observation.loop_ms
    return sum(part.ms(observation) for part in parts if part.unit)


@dataclass(frozen=True, kw_only=True)
class Model(Config):
    """What was run."""

    family: str
    model_hash: str
    backend: str
    device: str  # of contender and baseline
    precision: str
    kv_dtype: str
    kv_layout: str
    schedule: tuple[int, ...]  # grid side of every scale
    num_tokens: int
    num_layers: int = 0  # that have keys and values; 0: without a cache, or not recorded
    image_size_px: int
    sampling: dict[str, Any]
    weights_mib: dict[str, float]  # on disk, per contender
    # Weights that a call of a stage reads in the engines' precision; empty: not recorded.
    read_mib: dict[str, float] = field(default_factory=dict)

    @property
    def schedule_words(self) -> str:
        """How many tokens or cells of latents there are, and on how many grids."""
        grids = len(self.schedule)
        return f"{self.num_tokens} positions" + (f" in {grids} scale steps" if grids > 1 else "")


@dataclass(frozen=True, kw_only=True)
class BenchResult(Config):
    """The content of bench.json."""

    schema_version: int
    created: str  # UTC, ISO 8601
    seconds: float  # the whole benchmark
    options: dict[str, Any]
    environment: Environment
    ceilings: Ceilings | None  # None: not measured for this device
    model: Model
    contender: str  # the engines that every table is about
    baseline: str | None
    baseline_missing: str | None  # why there is none
    other_work_cores: float | None  # kept busy by other processes during the rounds, on average
    batches: tuple[BatchResult, ...]
    parity: Parity | None
    cold_runs: tuple[ColdRun, ...]
    warnings: tuple[str, ...]  # reasons to doubt the numbers
    trusted: bool  # whether there are none: only then ratios are told
    contract: Contract | None = None
    others: tuple[Entry, ...] = ()  # further contenders
    sweep: tuple[SweepPoint, ...] = ()
    guidance: tuple[GuidancePoint, ...] = ()  # all scales first
    footprint: Footprint | None = None  # of the contender; None: not counted for this model

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return a result of this schema; ConfigError for any other content."""
        if isinstance(values, Mapping):
            check_schema(values)
        return super().from_dict(values)

    @property
    def contenders(self) -> tuple[str, ...]:
        """Names of all that were timed: the contender, the baseline, the others."""
        timed = [entry.name for entry in self.others if entry.missing is None]
        return (self.contender, *((self.baseline,) if self.baseline else ()), *timed)


def read_result(path: Path) -> BenchResult:
    """Return the result in a bench.json, or in a folder with one.

    Raises ConfigError naming the file and what is wrong.
    """
    file = path / JSON_NAME if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"{file} does not exist; nsp bench writes it into its --output-dir")
    try:
        return BenchResult.from_dict(read_json(file))
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{file} is not a benchmark result ({error})") from error
