"""The tables of a benchmark's result, for the screen and for Markdown alike."""

from collections.abc import Callable, Iterator, Mapping

from nsp.benchmarks.ceilings.rates import Ceilings
from nsp.benchmarks.record.parity import Parity, StepParity
from nsp.benchmarks.record.result import BatchResult, BenchResult, Row
from nsp.benchmarks.render.contender_tables import (
    contenders_section,
    guidance_section,
    steps_section,
    sweep_section,
    tokens_section,
)
from nsp.benchmarks.render.memory_tables import cold_section, first_calls_section, footprint_section
from nsp.benchmarks.render.section import NONE, Section, db, ms, percent


def sections(result: BenchResult) -> Iterator[Section]:
    """Yield every table of the report, in reading order: doubts come before numbers."""
    if result.warnings:
        doubts = tuple((text,) for text in result.warnings)
        yield Section("Warnings", ("",), doubts, numbers=False, topic="warnings")
    for batch in result.batches:
        yield _latency_section(result, batch)
        if batch.step_rows:
            yield _steps_section(result, batch)
    if result.others:
        yield contenders_section(result)
    if any(batch.loop for batch in result.batches):
        yield steps_section(result)
        if (tokens := tokens_section(result)) is not None:
            yield tokens
    if result.sweep:
        yield sweep_section(result)
    if result.guidance:
        yield guidance_section(result)
    if result.cold_runs:
        yield cold_section(result)
        if result.footprint is not None and _has_runs(result):
            yield footprint_section(result, result.footprint)
        if any(run.stage_ms for run in result.cold_runs):
            yield first_calls_section(result)
    if result.parity is not None:
        yield _parity_section(result.parity)
    yield _environment_section(result)


def _has_runs(result: BenchResult) -> bool:
    return any(run.contender == result.contender for run in result.cold_runs)


def _latency_section(result: BenchResult, batch: BatchResult) -> Section:
    throughput = f"Throughput: {result.contender} {batch.images_per_s:.2f} images/s"
    if batch.baseline_images_per_s is not None:
        throughput += f", {result.baseline} {batch.baseline_images_per_s:.2f} images/s"
    rounds = f"{batch.rounds} interleaved rounds after warm-up; ms per batch of {batch.batch}."
    notes = [throughput, rounds, _ceilings_note(result.ceilings, batch)]
    if result.baseline_missing:
        notes.append(f"No PyTorch baseline: {result.baseline_missing}")
    return Section(
        title=f"Latency, batch {batch.batch}: {result.contender} {result.model.precision}",
        header=("stage", "calls", *_row_header(result)),
        rows=tuple(
            (row.name, str(row.calls), *_row_cells(result, row, batch.batch)) for row in batch.rows
        ),
        notes=tuple(notes),
        topic="latency",
    )


def _ceilings_note(ceilings: Ceilings | None, batch: BatchResult) -> str:
    if ceilings is None:
        return "No ceilings were measured."
    if all(row.cost is None for row in batch.rows):
        return "No rates: these engines were exported before costs were counted; export them again."
    threads = f" with {ceilings.threads} thread(s)" if ceilings.launch_us is None else ""
    return (
        f"Roof: the operations at this run's GEMM peak, {ceilings.gemm_peak_gflops:.0f} GFLOP/s "
        f"in {ceilings.dtype}{threads}. Memory: weights and tensors once per call "
        f"at {ceilings.bandwidth_gb_s:.1f} GB/s; caches can be faster."
    )


def _steps_section(result: BenchResult, batch: BatchResult) -> Section:
    return Section(
        title=f"Steps, batch {batch.batch}",
        header=("step", *_row_header(result)),
        rows=tuple((row.name, *_row_cells(result, row, batch.batch)) for row in batch.step_rows),
        topic="latency",
    )


def _row_header(result: BenchResult) -> tuple[str, ...]:
    ratio = ("speed-up",) if result.trusted else ()
    baseline = (f"{result.baseline} p50", *ratio) if result.baseline else ()
    share = ("of roof",) if result.trusted else ()
    roof = ("GFLOP", "roof ms", *share, "memory ms")
    return ("p50 ms", "p90", "p99", "images/s", *baseline, *roof)


def _row_cells(result: BenchResult, row: Row, batch: int) -> tuple[str, ...]:
    times = row.contender
    rate = ms(1e3 * batch / times.p50) if times.p50 else NONE
    cells = [ms(times.p50), ms(times.p90), ms(times.p99), rate]
    if result.baseline:
        cells.append(ms(row.baseline.p50) if row.baseline else NONE)
        if result.trusted:
            cells.append(NONE if row.speedup is None else f"{row.speedup:.2f}x")
    return (*cells, *_cost_cells(row, result.ceilings, trusted=result.trusted))


def _cost_cells(row: Row, ceilings: Ceilings | None, *, trusted: bool) -> tuple[str, ...]:
    """Return the work, the times that the ceilings allow, and the share of the roof if trusted."""
    cost, of_roof = row.cost, row.of_roof(ceilings)
    share = (NONE if of_roof is None else f"{100 * of_roof:.0f} %",) if trusted else ()
    if cost is None:
        return (NONE, NONE, *share, NONE)
    return (
        f"{cost.gflop:.3g}" if cost.gflop else NONE,
        ms(cost.roof_ms(ceilings)) if ceilings and cost.gflop else NONE,
        *share,
        ms(cost.memory_ms(ceilings)) if ceilings else NONE,
    )


def _parity_section(parity: Parity) -> Section:
    """Return the errors of every part; only the columns that any part has."""
    unexplained = sum(not flip.explained for flip in parity.flips)
    flips = f"Flips with the baseline's tokens: {parity.num_flips}"
    if parity.num_flips:
        flips += f", of the first {len(parity.flips)} beyond the measured error: {unexplained}"
    fed = "with the baseline's tokens fed to both; the last column is with each its own"
    free = "each running free with the same random numbers"
    psnr = f"PSNR of the images: {db(parity.forced_psnr_db)} from the same tokens, "
    columns = [
        (title, [show(step) for step in parity.steps]) for title, show in _PARITY_COLUMNS.items()
    ]
    used = [column for column in columns if any(cell != NONE for cell in column[1])]
    names = [step.name for step in parity.steps]
    return Section(
        title=f"Parity of {parity.contender} with {parity.baseline}",
        header=("step", *(title for title, _ in used)),
        rows=tuple(zip(names, *(cells for _, cells in used), strict=True)),
        notes=(
            f"Guided, {fed if parity.forced else free}. "
            f"{len(parity.conditions)} conditions, seed {parity.seed}.",
            *((flips,) if parity.forced else ()),
            f"{psnr if parity.forced else 'PSNR of the images: '}{db(parity.free_psnr_db)} "
            "free-running.",
        ),
        topic="parity",
    )


def _number(name: str) -> Callable[[StepParity], str]:
    def show(step: StepParity) -> str:
        value = getattr(step, name)
        return NONE if value is None else f"{value:.2e}"

    return show


def _share(name: str) -> Callable[[StepParity], str]:
    def show(step: StepParity) -> str:
        value = getattr(step, name)
        return NONE if value is None else percent(value)

    return show


_PARITY_COLUMNS: Mapping[str, Callable[[StepParity], str]] = {
    "tokens": lambda step: NONE if step.num_tokens is None else str(step.num_tokens),
    "max error": _number("max_abs_error"),
    "mean error": _number("mean_abs_error"),
    "latent's max error": _number("latent_max_abs_error"),
    "of range": _number("max_relative_error"),
    "KL": _number("kl_mean"),
    "top-1": _share("top1_agreement"),
    "sampled": _share("token_agreement"),
    "free-running": _share("free_token_agreement"),
}


def _environment_section(result: BenchResult) -> Section:
    environment, model = result.environment, result.model
    packages = environment.packages.items()
    other = NONE if (busy := result.other_work_cores) is None else f"{busy:.2f} cores busy"
    rows = (
        ("CPU", environment.cpu),
        ("processor's kind", environment.instructions or "not recorded"),
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
        ("trusted", "yes" if result.trusted else "no"),
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
        ("GEMM, GFLOP/s", f"{rates} ({ceilings.dtype}, {ceilings.gemm_side} squared)"),
        ("copy, GB/s", ", ".join(f"{rate:.1f}" for rate in ceilings.copy_gb_s)),
    )
