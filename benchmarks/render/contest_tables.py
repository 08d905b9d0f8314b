"""The tables of everybody's times: whole batches, the step loop, growth, guidance ended early."""

import statistics
from collections.abc import Sequence

from nsp.benchmarks.ceilings.product import GEMM, product_gflop
from nsp.benchmarks.contest.rounds import Observation
from nsp.benchmarks.record.intervals import median_ratio
from nsp.benchmarks.record.result import BatchResult, BenchResult
from nsp.benchmarks.render.section import NONE, Section, db, ms, percent


def rivals_section(result: BenchResult) -> Section:
    """Return everybody's whole batches, timed in the same rounds."""
    known = {entry.name: entry for entry in result.rivals}
    names = [*result.contestants, *(e.name for e in result.rivals if e.missing is not None)]
    rows = []
    for name in names:
        entry = known.get(name)
        cells = [ms(entry.prepare_s * 1e3) if entry and entry.prepare_s else NONE]
        for batch in result.batches:
            times = batch.times(name)
            whole = statistics.median(times) if times else None
            loop = _loop_ms(batch, name)
            cells += [NONE if value is None else ms(value) for value in (whole, loop)]
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


def sweep_section(result: BenchResult) -> Section:
    """Return the medians behind the plots of batch sizes and threads."""
    names = [name for name in (result.candidate, result.baseline) if name]
    rows = []
    for point in result.sweep:
        medians = [statistics.median(point.times(name)) for name in names]
        ratio = (f"{medians[1] / medians[0]:.2f}x",) if len(medians) > 1 else ()
        each = ms(medians[0] / point.scenario.batch)
        rounds = str(len(point.times(names[0])))
        cells = (rounds, *(ms(value) for value in medians), each, *ratio)
        rows.append((point.scenario.name, *cells))
    speedup = ("speed-up",) if len(names) > 1 else ()
    return Section(
        title="Batch sizes and threads",
        header=("", "rounds", *(f"{n} p50 ms" for n in names), "ms per image", *speedup),
        rows=tuple(rows),
        topic="sweep",
    )


def step_section(result: BenchResult) -> Section:
    """Return what everybody makes of the step stage: rate, share of the ceiling, ratios."""
    rows = []
    for batch in result.batches:
        row = next((row for row in batch.rows if row.name == "step"), None)
        if row is None:
            continue
        gflop = row.cost.gflop if row.cost else None
        times = {name: batch.times(name, step_ms) for name in result.contestants}
        for name in result.contestants:
            if not any(times[name]):  # a peer does not tell its steps apart
                continue
            median = statistics.median(times[name])
            rate = None if gflop is None else 1e3 * gflop / median
            cells = [ms(median), NONE if rate is None else f"{rate:.0f}"]
            peak = result.ceilings.gemm_peak_gflops if result.ceilings else None
            shares = (rate / peak if rate and peak else None, _of_products(result, batch, name))
            cells += [NONE if share is None else f"{100 * share:.0f} %" for share in shares]
            if result.baseline:
                cells.append(_ratio(times[result.baseline], times[name]))
            cells.append(_ratio(times[name], times[result.candidate]))
            rows.append((f"{name}, batch {batch.batch}", *cells))
    baseline = (f"times as fast as {result.baseline}",) if result.baseline else ()
    notes = [
        "All calls of the stage `step`, which is nearly all of an image's arithmetic; medians of "
        f"the same rounds, with 95 % intervals. Last column: how many times as fast "
        f"{result.candidate} is as the contestant of the line.",
    ]
    if result.ceilings is not None:
        notes.append(
            f"GEMM peak: {result.ceilings.gemm_peak_gflops:.0f} GFLOP/s in float32 in this run, "
            "which narrower types may pass; that is the best of all, and the rates are medians. "
            "Beside it the rate over that of one large product in the same round, median of the "
            "rounds: the speed of a shared machine changes, and both have it in common."
        )
    return Section(
        title="Step loop",
        header=(
            *("", "ms", "GFLOP/s", "of GEMM peak", "of GEMM beside it", *baseline),
            f"{result.candidate} is faster",
        ),
        rows=tuple(rows),
        notes=tuple(notes),
        topic="step",
    )


def _of_products(result: BenchResult, batch: BatchResult, name: str) -> float | None:
    """Return the rate of the step loop over that of the products timed in the same rounds."""
    row = next(row for row in batch.rows if row.name == "step")
    products = batch.times(GEMM)
    if row.cost is None or result.ceilings is None or not products:
        return None
    work = row.cost.gflop / product_gflop(result.ceilings.gemm_side)
    pairs = zip(batch.times(name, step_ms), products, strict=True)
    return statistics.median(work * product / loop for loop, product in pairs)


def step_ms(observation: Observation) -> float:
    """Return the time of all scale steps."""
    return observation.stage_total_ms("step")


def _ratio(base: Sequence[float], times: Sequence[float]) -> str:
    value, low, high = median_ratio(base, times)
    return f"{value:.2f}x" if low == high else f"{value:.2f}x [{low:.2f}, {high:.2f}]"


def guidance_section(result: BenchResult) -> Section:
    """Return what guidance on fewer scales saves, and what it changes."""
    full = result.guidance[0]
    rows = []
    for point in result.guidance:
        differing = [psnr for psnr in point.psnr_db if psnr is not None]
        # Equal pictures have no finite PSNR: they count as better than all others. The lower of two
        # in the middle, or a half that differs would be called identical.
        median = statistics.median_low(
            [psnr if psnr is not None else float("inf") for psnr in point.psnr_db]
        )
        rows.append(
            (
                str(point.guided_scales),
                ms(statistics.median(point.times_ms)),
                _ratio(full.times_ms, point.times_ms),
                percent(point.token_agreement),
                db(median if median != float("inf") else None),
                db(min(differing, default=None)),
            )
        )
    count = len(result.model.schedule)
    return Section(
        title="Guidance ended early",
        header=("guided scales", "ms", "times as fast", "equal tokens", "median PSNR", "lowest"),
        rows=tuple(rows),
        notes=(
            f"One image at a time, {len(full.times_ms)} interleaved rounds. Tokens and pictures "
            f"against guidance on all {count} scales: {len(full.psnr_db)} conditions, the same "
            "seeds, each setting with its own tokens. In `nsp generate`: --guidance-until.",
        ),
        topic="guidance",
    )
