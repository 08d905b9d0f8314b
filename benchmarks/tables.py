"""The tables of a benchmark's result, for the screen and for Markdown alike."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.machine import Ceilings
from benchmarks.memory import ColdRun
from benchmarks.parity import Parity
from benchmarks.results import BatchResult, BenchResult, Row
from benchmarks.timing import Observation

NONE = "-"


@dataclass(frozen=True)
class Section:
    """A table with its title and what must be said beside it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    numbers: bool = True  # all columns but the first are aligned to the right
    topic: str = ""  # chapter of the page it belongs to


def sections(result: BenchResult) -> Iterator[Section]:
    """Yield every table of the report, in reading order: doubts come before numbers."""
    if result.warnings:
        doubts = tuple((text,) for text in result.warnings)
        yield Section("Warnings", ("",), doubts, numbers=False, topic="warnings")
    for batch in result.batches:
        yield _latency_section(result, batch)
        if batch.scale_rows:
            yield _scales_section(result, batch)
    if result.rivals:
        yield _rivals_section(result)
    if result.sweep:
        yield _sweep_section(result)
    if result.cold_runs:
        yield _cold_section(result)
        yield _first_calls_section(result)
    if result.parity is not None:
        yield _parity_section(result, result.parity)
    yield _environment_section(result)


def _latency_section(result: BenchResult, batch: BatchResult) -> Section:
    throughput = f"Throughput: {result.candidate} {batch.images_per_s:.2f} images/s"
    if batch.baseline_images_per_s is not None:
        throughput += f", {result.baseline} {batch.baseline_images_per_s:.2f} images/s"
    rounds = f"{batch.rounds} interleaved rounds after warm-up; ms per batch of {batch.batch}."
    notes = [throughput, rounds, _ceilings_note(result.ceilings)]
    if result.baseline_missing:
        notes.append(f"No PyTorch baseline: {result.baseline_missing}")
    return Section(
        title=f"Latency, batch {batch.batch}: {result.candidate} {result.model.precision}",
        header=("stage", "calls", *_row_header(result)),
        rows=tuple(
            (row.name, str(row.calls), *_row_cells(result, row, batch.batch)) for row in batch.rows
        ),
        notes=tuple(notes),
        topic="latency",
    )


def _ceilings_note(ceilings: Ceilings | None) -> str:
    if ceilings is None:
        return "No ceilings: those of a GPU are not measured by this version."
    return (
        f"Roof: the operations at this run's GEMM peak, {ceilings.gemm_peak_gflops:.0f} GFLOP/s "
        f"in float32 with {ceilings.threads} thread(s). Memory: weights and tensors once per call "
        f"at {ceilings.bandwidth_gb_s:.1f} GB/s; caches can be faster."
    )


def _scales_section(result: BenchResult, batch: BatchResult) -> Section:
    return Section(
        title=f"Scale steps, batch {batch.batch}",
        header=("grid", *_row_header(result)),
        rows=tuple((row.name, *_row_cells(result, row, batch.batch)) for row in batch.scale_rows),
        topic="latency",
    )


def _row_header(result: BenchResult) -> tuple[str, ...]:
    baseline = (f"{result.baseline} p50", "speed-up") if result.baseline else ()
    roof = ("GFLOP", "roof ms", "of roof", "memory ms")
    return ("p50 ms", "p90", "p99", "images/s", *baseline, *roof)


def _row_cells(result: BenchResult, row: Row, batch: int) -> tuple[str, ...]:
    times = row.candidate
    rate = f"{1e3 * batch / times.p50:.3g}" if times.p50 else NONE
    cells = [_ms(times.p50), _ms(times.p90), _ms(times.p99), rate]
    if result.baseline:
        cells += [
            _ms(row.baseline.p50) if row.baseline else NONE,
            NONE if row.speedup is None else f"{row.speedup:.2f}x",
        ]
    return (*cells, *_cost_cells(row, result.ceilings))


def _cost_cells(row: Row, ceilings: Ceilings | None) -> tuple[str, str, str, str]:
    cost, of_roof = row.cost, row.of_roof(ceilings)
    if cost is None:
        return NONE, NONE, NONE, NONE
    return (
        f"{cost.gflop:.3g}" if cost.gflop else NONE,
        _ms(cost.roof_ms(ceilings)) if ceilings and cost.gflop else NONE,
        NONE if of_roof is None else f"{100 * of_roof:.0f} %",
        _ms(cost.memory_ms(ceilings)) if ceilings else NONE,
    )


def _rivals_section(result: BenchResult) -> Section:
    """Return everybody's whole batches, timed in the same rounds."""
    known = {entry.name: entry for entry in result.rivals}
    names = [*result.contestants, *(e.name for e in result.rivals if e.missing is not None)]
    rows = []
    for name in names:
        entry = known.get(name)
        cells = [_ms(entry.prepare_s * 1e3) if entry and entry.prepare_s else NONE]
        for batch in result.batches:
            times = batch.times(name)
            whole = statistics.median(times) if times else None
            loop = _loop_ms(batch, name)
            cells += [NONE if value is None else _ms(value) for value in (whole, loop)]
        rows.append((name, *cells))
    batches = [f"batch {b.batch}, {part} ms" for b in result.batches for part in ("all", "loop")]
    said = (
        f"{e.name}: {e.what}" + (f"; not timed: {e.missing}" if e.missing else "")
        for e in known.values()
    )
    return Section(
        title="Rivals",
        header=("contestant", "preparing ms", *batches),
        rows=tuple(rows),
        notes=(
            "Medians of the same interleaved rounds; the loop is everything but text encoder and "
            "decoder.",
            *said,
        ),
        topic="rivals",
    )


def _loop_ms(batch: BatchResult, name: str) -> float | None:
    """Return the median time of all but text encoder and decoder, None where they are not apart."""

    def loop(observation: Observation) -> float:
        ends = ("text_encoder", "decoder")
        return observation.wall_ms - sum(observation.stage_total_ms(stage) for stage in ends)

    times = batch.times(name, loop)
    return statistics.median(times) if times else None


def _sweep_section(result: BenchResult) -> Section:
    """Return the medians behind the plots of batch sizes and threads."""
    names = [name for name in (result.candidate, result.baseline) if name]
    rows = []
    for point in result.sweep:
        medians = [statistics.median(point.times(name)) for name in names]
        ratio = (f"{medians[1] / medians[0]:.2f}x",) if len(medians) > 1 else ()
        each = _ms(medians[0] / point.scenario.batch)
        rounds = str(len(point.times(names[0])))
        cells = (rounds, *(_ms(value) for value in medians), each, *ratio)
        rows.append((point.scenario.name, *cells))
    speedup = ("speed-up",) if len(names) > 1 else ()
    return Section(
        title="Batch sizes and threads",
        header=("", "rounds", *(f"{n} p50 ms" for n in names), "ms per image", *speedup),
        rows=tuple(rows),
        topic="sweep",
    )


def _cold_section(result: BenchResult) -> Section:
    names = dict.fromkeys(run.contestant for run in result.cold_runs)
    rows = []
    for name in names:
        runs = [run for run in result.cold_runs if run.contestant == name]
        rows.append((name, str(len(runs)), *_cold_cells(runs), _weights(result, name)))
    batch = result.cold_runs[0].batch
    return Section(
        title=f"Cold start and memory, batch {batch}",
        header=(
            "backend",
            "processes",
            "imported ms",
            "loaded ms",
            "first scale ms",
            "image ms",
            "first call ms",
            "loaded MiB",
            "peak MiB",
            "weight files MiB",
        ),
        rows=tuple(rows),
        notes=(
            "Medians over fresh processes. Moments count from the process's creation; the first "
            "call is from loaded to image. Memory is resident memory, libraries included.",
        ),
        topic="memory",
    )


def _cold_cells(runs: Sequence[ColdRun]) -> tuple[str, ...]:
    def median(name: str) -> float:
        return float(statistics.median(getattr(run, name) for run in runs))

    return (
        _ms(median("imported_ms")),
        _ms(median("loaded_ms")),
        _ms(median("first_step_ms")),
        _ms(median("image_ms")),
        _ms(median("first_call_ms")),
        f"{median('loaded_mib'):.0f}",
        f"{median('peak_mib'):.0f}",
    )


def _first_calls_section(result: BenchResult) -> Section:
    """Return the first call of every stage and by how much memory grew up to the end of it."""
    names = list(dict.fromkeys(run.contestant for run in result.cold_runs))
    rows = []
    for stage in result.cold_runs[0].stage_ms:
        cells = []
        for name in names:
            runs = [run for run in result.cold_runs if run.contestant == name]
            cells.append(_ms(statistics.median(run.stage_ms[stage] for run in runs)))
            cells.append(f"{statistics.median(run.stage_growth_mib(stage) for run in runs):.1f}")
        rows.append((stage, *cells))
    return Section(
        title="First call of every stage, batch 1",
        header=("stage", *(f"{name} {unit}" for name in names for unit in ("ms", "+MiB"))),
        rows=tuple(rows),
        notes=("Loading in the background counts into the call that waits for it.",),
        topic="memory",
    )


def _weights(result: BenchResult, name: str) -> str:
    size = result.model.weights_mib.get(name)
    return NONE if size is None else f"{size:.1f}"


def _parity_section(result: BenchResult, parity: Parity) -> Section:
    rows = tuple(
        (
            f"{side}x{side}",
            str(scale.num_tokens),
            f"{scale.max_abs_error:.2e}",
            f"{scale.mean_abs_error:.2e}",
            f"{scale.max_relative_error:.2e}",
            f"{scale.kl_mean:.2e}",
            _percent(scale.top1_agreement),
            _percent(scale.token_agreement),
            _percent(scale.free_token_agreement),
        )
        for side, scale in zip(result.model.schedule, parity.scales, strict=True)
    )
    unexplained = sum(not flip.explained for flip in parity.flips)
    flips = f"Flips with the reference's tokens: {parity.num_flips}"
    if parity.num_flips:
        flips += f", of the first {len(parity.flips)} beyond the measured error: {unexplained}"
    return Section(
        title=f"Parity of {parity.candidate} with {parity.reference}",
        header=(
            "grid",
            "tokens",
            "max error",
            "mean error",
            "of range",
            "KL",
            "top-1",
            "sampled",
            "free-running",
        ),
        rows=rows,
        notes=(
            "Guided logits, with the reference's tokens fed to both; the last column is with each "
            f"its own. {len(parity.conditions)} conditions, seed {parity.seed}.",
            flips,
            f"PSNR of the images: {_db(parity.forced_psnr_db)} from the same tokens, "
            f"{_db(parity.free_psnr_db)} free-running.",
        ),
        topic="parity",
    )


def _environment_section(result: BenchResult) -> Section:
    environment, model = result.environment, result.model
    packages = environment.packages.items()
    other = NONE if (busy := result.other_work_cores) is None else f"{busy:.2f} cores busy"
    rows = (
        ("CPU", environment.cpu),
        ("cores", f"{environment.logical_cores} logical, {environment.usable_cores} usable"),
        ("threads", str(environment.threads)),
        ("RAM", f"{environment.ram_gib} GiB"),
        ("GPU", environment.gpu or "none"),
        ("system", environment.system),
        ("Python", environment.python),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages)),
        ("load average", f"{environment.load_average} at the start"),
        ("other work", other),
        ("model", f"{model.family}, {model.model_hash[:12]}"),
        ("schedule", f"{', '.join(map(str, model.schedule))} ({model.num_tokens} tokens)"),
        ("image", f"{model.image_size_px} px"),
        ("backend", f"{model.backend}, {model.precision}, {model.device}"),
        ("KV cache", f"{model.kv_dtype}, layout {model.kv_layout}"),
        ("sampling", ", ".join(f"{key}={value}" for key, value in model.sampling.items())),
        *_ceiling_rows(result.ceilings),
        ("measured", f"{result.created}, {result.seconds:.0f} s"),
    )
    return Section("Environment", ("", ""), rows, numbers=False, topic="environment")


def _ceiling_rows(ceilings: Ceilings | None) -> tuple[tuple[str, str], ...]:
    """Return every measurement of the ceilings, before and after."""
    if ceilings is None:
        return ()
    rates = "; ".join(
        f"{name} {', '.join(f'{rate:.0f}' for rate in rates)}"
        for name, rates in ceilings.gemm_gflops.items()
    )
    return (
        ("GEMM, GFLOP/s", f"{rates} (float32, {ceilings.gemm_side} squared)"),
        ("copy, GB/s", ", ".join(f"{rate:.1f}" for rate in ceilings.copy_gb_s)),
    )


def _ms(value: float) -> str:
    """Return milliseconds with about three digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _percent(share: float) -> str:
    """Return a share; 100 % only when it is all."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.2f} %"


def _db(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"
