"""`nsp bench`: measures an engine folder, of any family and device, beside its baseline.

    load both -> parity -> interleaved rounds per scenario -> fresh processes -> sweep -> report

The ceilings of the machine are measured before and after, so that a change of its speed is noticed.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nsp.benchmarks.ceilings.clock import torch_uses_gpu
from nsp.benchmarks.ceilings.cpu import measure_ceilings
from nsp.benchmarks.ceilings.product import Product
from nsp.benchmarks.ceilings.rates import Ceilings
from nsp.benchmarks.contest.cold import cold_run
from nsp.benchmarks.contest.contenders import Source
from nsp.benchmarks.contest.field import Asked, Ready, asked_for, default_names, make_ready, peers
from nsp.benchmarks.contest.guidance import guidance_sweep
from nsp.benchmarks.contest.parity import compare
from nsp.benchmarks.contest.pictures import make_pictures
from nsp.benchmarks.contest.rounds import Runner, Timed, interleaved
from nsp.benchmarks.contest.steps import parts
from nsp.benchmarks.contest.subject import Subject, load_subject, torch_threads
from nsp.benchmarks.contest.sweep import batch_scenarios, sweep, sweep_scenarios
from nsp.benchmarks.costs import counter, footprint
from nsp.benchmarks.options import BenchOptions, Effort, plain
from nsp.benchmarks.record.cold import ColdRun
from nsp.benchmarks.record.contract import TIMING_BOUNDARY, Contract
from nsp.benchmarks.record.doubts import doubts
from nsp.benchmarks.record.environment import Environment, OtherWork
from nsp.benchmarks.record.parity import Parity
from nsp.benchmarks.record.result import (
    BatchResult,
    BenchResult,
    Footprint,
    Scenario,
    Stopped,
)
from nsp.benchmarks.record.rows import batch_result
from nsp.benchmarks.record.schema import SCHEMA
from nsp.benchmarks.record.times import Observation
from nsp.benchmarks.render.report import BenchReport, write_report
from nsp.cores import num_threads, usable_cores
from nsp.errors import ConfigError

logger = logging.getLogger(__name__)

PARITY_BATCH = 4


@dataclass(frozen=True, kw_only=True)
class BenchEvent:
    """Progress: what is going on, and how much of it is done."""

    activity: str
    done: int
    total: int


OnEvent = Callable[[BenchEvent], None]


def run(options: BenchOptions, *, on_event: OnEvent | None = None) -> BenchReport:
    """Return the report, written to `output_dir` once everything is measured.

    Raises EngineError, CheckpointError or BackendError for what cannot be loaded, ParityError for
    engines that do not give finite numbers, ConfigError for a batch the engines do not take.
    """
    threads = num_threads(options.threads)
    bench = Bench(options, Effort.of(options), threads, on_event or _ignore)
    bench.tell("loading")
    subject = bench.load(threads)
    result = bench.measure(subject)
    if options.sweep:
        result = bench.swept(result, subject)
    bench.tell("contact sheet")
    pictures = make_pictures(subject, seed=options.seed)
    report = write_report(result, options.output_dir, pictures=pictures)
    logger.info("benchmark took %.0f s: %s", result.seconds, report.markdown_path)
    return report


@dataclass(frozen=True)
class Bench:
    """One benchmark: its options, and whom to tell of its progress."""

    options: BenchOptions
    effort: Effort
    threads: int
    on_event: OnEvent
    more: tuple[Asked, ...] = ()  # contenders that are not known by name

    def tell(self, activity: str, done: int = 0, total: int = 1) -> None:
        """Tell what is going on."""
        self.on_event(BenchEvent(activity=activity, done=done, total=total))

    def load(self, threads: int) -> Subject:
        """Return engines and baseline, loaded for a number of threads."""
        options = self.options
        return load_subject(
            options.engine_dir,
            checkpoint=options.checkpoint,
            backend=options.backend,
            precision=options.precision,
            threads=threads,
        )

    def measure(self, subject: Subject) -> BenchResult:
        """Return everything measured about a loaded subject, but for the sweep."""
        options, effort = self.options, self.effort
        _check_batch_sizes(subject, options)
        began, created = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        environment = Environment.read(threads=self.threads)
        before = self._ceilings(subject)
        scenarios = batch_scenarios(options.batch_sizes, threads=self.threads)
        with torch_threads(subject, self.threads), ExitStack() as stack:
            parity = self._parity(subject)
            others = list(self._others(subject, stack))
            other_work = OtherWork([each.process for each in others if each.process])
            batches = tuple(self._batch(subject, each, others) for each in scenarios)
            other_cores = other_work.cores()
        cold_runs = tuple(self._cold_runs(subject, others))
        after = self._ceilings(subject)
        ceilings = before.joined(after) if before and after else None
        warnings = tuple(doubts(environment, other_cores, ceilings, batches))
        return BenchResult(
            schema_version=SCHEMA,
            created=created,
            seconds=time.perf_counter() - began,
            options={**plain(options), **plain(effort)},
            environment=environment,
            ceilings=ceilings,
            model=subject.model(),
            contender=subject.contender.name,
            baseline=subject.baseline.name if subject.baseline else None,
            baseline_missing=subject.baseline_missing,
            batches=batches,
            parity=parity,
            cold_runs=cold_runs,
            other_work_cores=other_cores,
            warnings=warnings,
            trusted=not warnings,
            contract=_contract(subject, options, environment),
            others=tuple(each.entry for each in others),
            footprint=self._footprint(subject),
        )

    def swept(self, result: BenchResult, subject: Subject) -> BenchResult:
        """Return the result with the sweep over batch sizes, threads and guidance ended early."""
        effort = self.effort
        points = sweep(
            self.load,
            sweep_scenarios(cores=usable_cores(), max_batch=subject.contender.pipeline.max_batch),
            rounds=effort.sweep_rounds,
            warmup=min(1, effort.warmup),
            seed=self.options.seed,
            seconds_per_batch=effort.sweep_seconds,
            on_start=self.tell,
        )
        result = dataclasses.replace(result, sweep=tuple(points))
        self.tell("sweep: guidance ended early")
        guidance = guidance_sweep(
            subject.contender.pipeline,
            subject.conditions,
            rounds=effort.sweep_rounds,
            seconds=effort.sweep_seconds,
            seed=self.options.seed,
        )
        return dataclasses.replace(result, guidance=tuple(guidance))

    def _ceilings(self, subject: Subject) -> Ceilings | None:
        """Return the ceilings of the device the engines run on; None if torch cannot use it."""
        self.tell("ceilings")
        if subject.device == "cpu":
            return measure_ceilings(threads=self.threads, gemm_side=self.effort.gemm_side)
        if not torch_uses_gpu():
            return None
        from nsp.benchmarks.ceilings.gpu import measure_gpu_ceilings

        precision = subject.contender.pipeline.precision
        return measure_gpu_ceilings(subject.device, precision, repeats=self.effort.sweep_rounds)

    def _parity(self, subject: Subject) -> Parity | None:
        """Return the parity with the baseline; None without one."""
        if subject.baseline is None:
            return None
        self.tell("parity")
        limit = subject.contender.pipeline.max_batch or PARITY_BATCH
        size, count = min(PARITY_BATCH, limit), self.effort.num_conditions
        return compare(
            subject.baseline.pipeline,
            subject.contender.pipeline,
            subject.requests(count, size, self.options.seed),
            names=(subject.baseline.name, subject.contender.name),
            conditions=subject.titles(count, self.options.seed),
        )

    def _others(self, subject: Subject, stack: ExitStack) -> Iterator[Ready]:
        """Yield all further contenders; their processes end with `stack`."""
        options = self.options
        names: Sequence[str] = options.contenders or ()
        if options.contenders is None and not options.quick:
            names = default_names(subject)
        asked = [*self.more, *(asked_for(name, subject, self.threads) for name in names)]
        yield from make_ready(
            asked,
            subject,
            batches=options.batch_sizes,
            seed=options.seed,
            on_start=self.tell,
        )
        yield from peers(subject, options.peer, self.threads, stack)

    def _batch(self, subject: Subject, scenario: Scenario, others: Sequence[Ready]) -> BatchResult:
        """Return the times of one scenario, everybody in the same rounds."""
        effort, request = self.effort, subject.request(scenario.batch, self.options.seed)
        sides = [Runner(s.name, s.pipeline, device=subject.device) for s in subject.sides]
        count = counter(subject.costs, subject.contender.pipeline)
        played = sides[0].play(request)
        contenders: list[Timed] = [*sides, *(each.runner for each in others if each.runner)]
        if subject.device == "cpu":
            contenders += Product.contenders(effort.gemm_side, threads=scenario.threads)
        observations: list[Observation] = []
        total = (effort.warmup + effort.rounds) * len(contenders)
        for observation in interleaved(
            contenders,
            request,
            rounds=effort.rounds,
            warmup=effort.warmup,
            max_seconds=effort.seconds_per_batch,
            stability=effort.stability,
        ):
            observations.append(observation)
            self.tell(scenario.name, len(observations), total)
        return batch_result(
            observations,
            list(parts(played, count)),
            batch=scenario.batch,
            contender=subject.contender.name,
            baseline=subject.baseline.name if subject.baseline else None,
            stopped=_stopped(observations, effort, len(contenders)),
        )

    def _cold_runs(self, subject: Subject, others: Sequence[Ready]) -> Iterator[ColdRun]:
        """Yield what fresh processes measured, with batch 1, taking turns.

        On a GPU every contender has one: what compiling and recording need is seen only there.
        """
        effort = self.effort
        counts = (effort.engine_processes, effort.baseline_processes)
        sources = list(zip((side.source for side in subject.sides), counts, strict=False))
        if subject.device != "cpu":
            sources += [(each.source, min(1, counts[0])) for each in others if each.source]
        turns = range(max(counts))
        planned: list[Source] = [s for turn in turns for s, count in sources if turn < count]
        request = subject.request(1, self.options.seed)
        for done, source in enumerate(planned):
            self.tell("fresh processes", done, len(planned))
            device = subject.device
            yield cold_run(source, request, batch=1, threads=self.threads, device=device)

    def _footprint(self, subject: Subject) -> Footprint | None:
        """Return what one image on a processor must take; None where it is not counted."""
        if subject.device != "cpu":
            return None
        side = subject.contender
        calls = Runner(side.name, side.pipeline).play(subject.request(1, self.options.seed)).calls
        weights_mib = subject.weights_mib[side.name]
        return footprint(subject.costs, side.pipeline, calls, weights_mib=weights_mib)


def _contract(subject: Subject, options: BenchOptions, environment: Environment) -> Contract:
    """Return what another result must have in common with this one to be compared."""
    model = subject.model()
    return Contract(
        weights=model.model_hash,
        conditions=subject.titles(max(options.batch_sizes), options.seed),
        seed=options.seed,
        schedule=model.schedule,
        image_size_px=model.image_size_px,
        sampling={name: str(value) for name, value in model.sampling.items()},
        timing_boundary=TIMING_BOUNDARY,
        device=model.device,
        machine={
            "processor": environment.cpu,
            "processor's kind": environment.instructions or "unknown",
            "cores": str(environment.logical_cores),
            "threads": str(environment.threads),
            "memory": f"{environment.ram_gib:.0f} GiB",
            "GPU": environment.gpu or "none",
        },
    )


def _check_batch_sizes(subject: Subject, options: BenchOptions) -> None:
    limit, largest = subject.contender.pipeline.max_batch, max(options.batch_sizes)
    if limit is not None and largest > limit:
        raise ConfigError(
            f"batch size {largest} is outside the engine's 1..{limit}; "
            f"omit it or export again with --max-batch {largest}"
        )


def _stopped(observations: Sequence[Observation], effort: Effort, contenders: int) -> Stopped:
    """Return what ended a measurement."""
    if len(observations) == (effort.warmup + effort.rounds) * contenders:
        return "rounds"
    stable = effort.stability is not None and effort.stability.reached(observations)
    return "stable" if stable else "time"


def _ignore(event: Any) -> None:
    """Ignore an event."""
