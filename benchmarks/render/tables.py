"""The tables of a benchmark's result, for the screen and for Markdown alike."""

from collections.abc import Iterator

from nsp.benchmarks.ceilings.cpu import Ceilings
from nsp.benchmarks.contest.parity import Parity
from nsp.benchmarks.record.result import BatchResult, BenchResult, Row
from nsp.benchmarks.render.contest_tables import (
    guidance_section,
    rivals_section,
    step_section,
    sweep_section,
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
        if batch.scale_rows:
            yield _scales_section(result, batch)
    if result.rivals:
        yield rivals_section(result)
    if any(row.name == "step" for batch in result.batches for row in batch.rows):
        yield step_section(result)
    if result.sweep:
        yield sweep_section(result)
    if result.guidance:
        yield guidance_section(result)
    if result.cold_runs:
        yield cold_section(result)
        if result.footprint is not None and _has_runs(result):
            yield footprint_section(result, result.footprint)
        yield first_calls_section(result)
    if result.parity is not None:
        yield _parity_section(result, result.parity)
    yield _environment_section(result)


def _has_runs(result: BenchResult) -> bool:
    return any(run.contestant == result.candidate for run in result.cold_runs)


def _latency_section(result: BenchResult, batch: BatchResult) -> Section:
    throughput = f"Throughput: {result.candidate} {batch.images_per_s:.2f} images/s"
    if batch.baseline_images_per_s is not None:
        throughput += f", {result.baseline} {batch.baseline_images_per_s:.2f} images/s"
    rounds = f"{batch.rounds} interleaved rounds after warm-up; ms per batch of {batch.batch}."
    notes = [throughput, rounds, _ceilings_note(result.ceilings)]
    if result.baseline_missing:
        notes.append(f"No PyTorch baseline: {result.baseline_missing}")
    if result.parity is None and result.baseline:
        notes.append(
            "Parity is not among the tables: this model cannot be given the tokens of a whole "
            "scale. `nsp verify` holds every stage to PyTorch, and the report has pictures of both."
        )
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
        return "No ceilings: this version does not measure those of a GPU."
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
    rate = ms(1e3 * batch / times.p50) if times.p50 else NONE
    cells = [ms(times.p50), ms(times.p90), ms(times.p99), rate]
    if result.baseline:
        cells += [
            ms(row.baseline.p50) if row.baseline else NONE,
            NONE if row.speedup is None else f"{row.speedup:.2f}x",
        ]
    return (*cells, *_cost_cells(row, result.ceilings))


def _cost_cells(row: Row, ceilings: Ceilings | None) -> tuple[str, str, str, str]:
    cost, of_roof = row.cost, row.of_roof(ceilings)
    if cost is None:
        return NONE, NONE, NONE, NONE
    return (
        f"{cost.gflop:.3g}" if cost.gflop else NONE,
        ms(cost.roof_ms(ceilings)) if ceilings and cost.gflop else NONE,
        NONE if of_roof is None else f"{100 * of_roof:.0f} %",
        ms(cost.memory_ms(ceilings)) if ceilings else NONE,
    )


def _parity_section(result: BenchResult, parity: Parity) -> Section:
    rows = tuple(
        (
            f"{side}x{side}",
            str(scale.num_tokens),
            f"{scale.max_abs_error:.2e}",
            f"{scale.mean_abs_error:.2e}",
            f"{scale.max_relative_error:.2e}",
            f"{scale.kl_mean:.2e}",
            percent(scale.top1_agreement),
            percent(scale.token_agreement),
            percent(scale.free_token_agreement),
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
            f"PSNR of the images: {db(parity.forced_psnr_db)} from the same tokens, "
            f"{db(parity.free_psnr_db)} free-running.",
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
