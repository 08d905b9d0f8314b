"""`nsp bench`: measures an engine folder and the PyTorch model it was made from.

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

from nsp.benchmarks.ceilings.cpu import Ceilings, Environment, OtherWork, measure_ceilings
from nsp.benchmarks.ceilings.product import Product
from nsp.benchmarks.contest.cold import ColdRun, cold_run
from nsp.benchmarks.contest.contenders import RIVALS, make_rivals, other_precisions
from nsp.benchmarks.contest.guidance import guidance_sweep
from nsp.benchmarks.contest.parity import Parity, compare, takes_tokens
from nsp.benchmarks.contest.pictures import Pictures, make_pictures
from nsp.benchmarks.contest.rounds import Contestant, Observation, Timed, interleaved
from nsp.benchmarks.contest.scenarios import Scenario, batch_scenarios, sweep_scenarios
from nsp.benchmarks.contest.subject import Subject, load_subject, torch_threads
from nsp.benchmarks.contest.sweep import sweep
from nsp.benchmarks.footprint import FOOTPRINTS
from nsp.benchmarks.options import BenchOptions, Effort, plain
from nsp.benchmarks.peers.process import peer_process
from nsp.benchmarks.record.contract import TIMING_BOUNDARY, Contract
from nsp.benchmarks.record.doubts import doubts
from nsp.benchmarks.record.result import (
    SCHEMA,
    BatchResult,
    BenchResult,
    Entry,
    Footprint,
    Stopped,
    SweepPoint,
    batch_result,
    call_costs,
)
from nsp.benchmarks.render.report import BenchReport, write_report
from nsp.cores import num_threads, usable_cores
from nsp.errors import BackendError, ConfigError

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
    emit = on_event or _ignore
    emit(BenchEvent(activity="loading", done=0, total=1))
    subject, effort = _load(options, threads), Effort.of(options)
    result = measure(subject, options, effort, threads=threads, on_event=emit)
    if options.sweep:
        points = tuple(_sweep(subject, options, effort, emit))
        result = dataclasses.replace(result, sweep=points)
    if options.sweep and hasattr(subject.candidate.pipeline.sampling, "guidance_until"):
        emit(BenchEvent(activity="sweep: guidance ended early", done=0, total=1))
        guidance = guidance_sweep(
            subject.candidate.pipeline,
            subject.conditions,
            rounds=effort.sweep_rounds,
            seconds=effort.sweep_seconds,
            seed=options.seed,
        )
        result = dataclasses.replace(result, guidance=tuple(guidance))
    report = write_report(result, options.output_dir, pictures=_pictures(subject, options, emit))
    logger.info("benchmark took %.0f s: %s", result.seconds, report.markdown_path)
    return report


def _load(options: BenchOptions, threads: int) -> Subject:
    """Return both sides, loaded for a number of threads."""
    return load_subject(
        options.engine_dir,
        checkpoint=options.checkpoint,
        backend=options.backend,
        precision=options.precision,
        threads=threads,
    )


def _sweep(
    subject: Subject, options: BenchOptions, effort: Effort, on_event: OnEvent
) -> Iterator[SweepPoint]:
    """Yield the sweep's points; `subject` says what the engines take."""
    limit = subject.candidate.pipeline.max_batch
    yield from sweep(
        lambda threads: _load(options, threads),
        sweep_scenarios(cores=usable_cores(), max_batch=limit),
        rounds=effort.sweep_rounds,
        warmup=min(1, effort.warmup),
        seed=options.seed,
        seconds_per_batch=effort.sweep_seconds,
        on_start=lambda name, done, total: on_event(
            BenchEvent(activity=name, done=done, total=total)
        ),
    )


def _pictures(subject: Subject, options: BenchOptions, on_event: OnEvent) -> Pictures | None:
    """Return the pictures of both sides for the same prompts, or None without a baseline."""
    on_event(BenchEvent(activity="contact sheet", done=0, total=1))
    return make_pictures(subject, seed=options.seed)


def measure(
    subject: Subject,
    options: BenchOptions,
    effort: Effort,
    *,
    threads: int,
    on_event: OnEvent,
) -> BenchResult:
    """Return everything measured about a loaded subject."""
    _check_batch_sizes(subject, options)
    began, created = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    environment = Environment.read(threads=threads)
    before = _ceilings(subject, effort, threads, on_event)
    scenarios = batch_scenarios(options.batch_sizes, threads=threads)
    with torch_threads(subject, threads), ExitStack() as stack:
        parity = _parity(subject, options, effort, on_event)
        entries, rivals = _rivals(subject, options, threads, stack, on_event)
        other_work = OtherWork()
        batches = tuple(
            _batch(subject, options, effort, each, rivals, on_event) for each in scenarios
        )
        other_cores = other_work.cores()
    cold_runs = tuple(_cold_runs(subject, options, effort, threads, on_event))
    after = _ceilings(subject, effort, threads, on_event)
    ceilings = before.joined(after) if before and after else None
    return BenchResult(
        schema_version=SCHEMA,
        created=created,
        seconds=time.perf_counter() - began,
        options={**plain(options), **plain(effort)},
        environment=environment,
        ceilings=ceilings,
        model=subject.model(),
        candidate=subject.candidate.name,
        baseline=subject.baseline.name if subject.baseline else None,
        baseline_missing=subject.baseline_missing,
        batches=batches,
        parity=parity,
        cold_runs=cold_runs,
        other_work_cores=other_cores,
        warnings=tuple(doubts(environment, other_cores, ceilings, batches)),
        contract=_contract(subject, options, environment),
        rivals=entries,
        footprint=_footprint(subject, options),
    )


def _footprint(subject: Subject, options: BenchOptions) -> Footprint | None:
    """Return what one image on a processor must take; None for families that are not counted."""
    side = subject.candidate
    if subject.device != "cpu" or side.pipeline.family.name not in FOOTPRINTS:
        return None
    contestant = Contestant(side.name, side.pipeline)
    calls = contestant.stage_calls(subject.request(1, options.seed))
    rows = max(call.sizes.get("G", 0) for call in calls)
    return FOOTPRINTS[side.pipeline.family.name](
        side.pipeline.config,
        calls,
        weights_mib=subject.weights_mib[side.name],
        kv_layout=side.pipeline.backend.kv_layout,
        kv_shape=side.pipeline.family.cache(
            side.pipeline.config, rows, side.pipeline.backend.kv_dtype()
        ),
    )


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
            "cores": str(environment.logical_cores),
            "threads": str(environment.threads),
            "memory": f"{environment.ram_gib:.0f} GiB",
            "GPU": environment.gpu or "none",
        },
    )


def _rivals(
    subject: Subject,
    options: BenchOptions,
    threads: int,
    stack: ExitStack,
    on_event: OnEvent,
) -> tuple[tuple[Entry, ...], list[Timed]]:
    """Return what is said of every rival, and those that are ready; processes end with `stack`."""
    names: Sequence[str] = options.rivals or ()
    if options.rivals is None and not options.quick:
        made_from_baseline = RIVALS if subject.baseline is not None else ()
        names = (*made_from_baseline, *other_precisions(subject))
    entries: list[Entry] = []
    ready: list[Timed] = []
    for entry, contestant in make_rivals(
        names,
        subject,
        threads=threads,
        batches=options.batch_sizes,
        seed=options.seed,
        on_start=lambda activity: on_event(BenchEvent(activity=activity, done=0, total=1)),
    ):
        entries.append(entry)
        ready += [contestant] if contestant is not None else []
    if options.peer_var is not None:
        pipeline = subject.candidate.pipeline
        if subject.device != "cpu" or pipeline.family.name != "var":
            raise BackendError("--peer-var is timed beside engines of the family var on a CPU")
        process = peer_process(
            options.peer_var, pipeline.config, pipeline.sampling, threads=threads
        )
        peer = stack.enter_context(process)
        entries.append(Entry(name=peer.name, what=peer.what))
        ready.append(peer)
    return tuple(entries), ready


def _check_batch_sizes(subject: Subject, options: BenchOptions) -> None:
    limit, largest = subject.candidate.pipeline.max_batch, max(options.batch_sizes)
    if limit is not None and largest > limit:
        raise ConfigError(
            f"batch size {largest} is outside the engine's 1..{limit}; "
            f"omit it or export again with --max-batch {largest}"
        )


def _ceilings(subject: Subject, effort: Effort, threads: int, on_event: OnEvent) -> Ceilings | None:
    """Return the ceilings of the processor, or None where the engines run on a GPU."""
    if subject.device != "cpu":
        return None
    on_event(BenchEvent(activity="ceilings", done=0, total=1))
    return measure_ceilings(threads=threads, gemm_side=effort.gemm_side)


def _parity(
    subject: Subject, options: BenchOptions, effort: Effort, on_event: OnEvent
) -> Parity | None:
    """Return the parity with the baseline; None without one, or if tokens cannot be given."""
    if subject.baseline is None or not takes_tokens(subject.candidate.pipeline):
        return None
    on_event(BenchEvent(activity="parity", done=0, total=1))
    limit = subject.candidate.pipeline.max_batch
    return compare(
        subject.baseline.pipeline,
        subject.candidate.pipeline,
        subject.conditions(effort.num_conditions),
        names=(subject.baseline.name, subject.candidate.name),
        seed=options.seed,
        max_batch=min(PARITY_BATCH, limit or PARITY_BATCH),
    )


def _batch(
    subject: Subject,
    options: BenchOptions,
    effort: Effort,
    scenario: Scenario,
    rivals: Sequence[Timed],
    on_event: OnEvent,
) -> BatchResult:
    """Return the times of one scenario, everybody in the same rounds."""
    request = subject.request(scenario.batch, options.seed)
    sides = [Contestant(side.name, side.pipeline) for side in subject.sides]
    pipeline = subject.candidate.pipeline
    costs = call_costs(
        sides[0].stage_calls(request),
        pipeline.backend.stages_io,
        family=pipeline.family.name,
        config=pipeline.config,
        weight_dtype=pipeline.backend.kv_dtype(),
        text_encoder=subject.text_encoder,
    )
    yardstick = Product.contestants(effort.gemm_side, threads=scenario.threads)
    contestants: list[Timed] = [*sides, *rivals, *(yardstick if subject.device == "cpu" else ())]
    observations: list[Observation] = []
    total = (effort.warmup + effort.rounds) * len(contestants)
    for observation in interleaved(
        contestants,
        request,
        rounds=effort.rounds,
        warmup=effort.warmup,
        max_seconds=effort.seconds_per_batch,
        stability=effort.stability,
    ):
        observations.append(observation)
        on_event(BenchEvent(activity=scenario.name, done=len(observations), total=total))
    return batch_result(
        observations,
        costs,
        batch=scenario.batch,
        candidate=subject.candidate.name,
        baseline=subject.baseline.name if subject.baseline else None,
        scale_names=[f"{h}x{w}" for h, w in pipeline.family.grids(pipeline.config)],
        stopped=_stopped(observations, effort, len(contestants)),
    )


def _stopped(observations: Sequence[Observation], effort: Effort, contestants: int) -> Stopped:
    """Return what ended a measurement."""
    if len(observations) == (effort.warmup + effort.rounds) * contestants:
        return "rounds"
    stable = effort.stability is not None and effort.stability.reached(observations)
    return "stable" if stable else "time"


def _cold_runs(
    subject: Subject, options: BenchOptions, effort: Effort, threads: int, on_event: OnEvent
) -> Iterator[ColdRun]:
    """Yield what fresh processes measured, with batch 1, the sides taking turns."""
    request = subject.request(1, options.seed)
    counts = [effort.candidate_processes, effort.baseline_processes]
    planned = [
        side
        for turn in range(max(counts))
        for side, count in zip(subject.sides, counts, strict=False)
        if turn < count
    ]
    for done, side in enumerate(planned):
        on_event(BenchEvent(activity="fresh processes", done=done, total=len(planned)))
        yield cold_run(side.source, request, batch=1, threads=threads)


def _ignore(event: BenchEvent) -> None:
    """Ignore an event."""
