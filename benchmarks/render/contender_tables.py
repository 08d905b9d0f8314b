"""The tables of everybody's times: whole batches, all steps, growth, guidance ended early."""

import statistics
from collections.abc import Sequence

from nsp.benchmarks.ceilings.product import GEMM, product_gflop
from nsp.benchmarks.record.result import BatchResult, BenchResult, Cost, Entry
from nsp.benchmarks.record.times import median_ratio
from nsp.benchmarks.render.section import NONE, Section, db, ms, percent


def contenders_section(result: BenchResult) -> Section:
    """Return everybody's whole batches, timed in the same rounds."""
    known = {entry.name: entry for entry in result.others}
    names = [*result.contenders, *(e.name for e in result.others if e.missing is not None)]
    closeness = any(e.max_relative_error is not None for e in result.others)
    rows = []
    for name in names:
        entry = known.get(name)
        cells = [ms(entry.prepare_s * 1e3) if entry and entry.prepare_s else NONE]
        for batch in result.batches:
            both = (batch.times(name), _loop_times(batch, name))
            cells += [ms(statistics.median(each)) if any(each) else NONE for each in both]
        rows.append((name, *cells, *(_closeness(entry) if closeness else ())))
    batches = [f"batch {b.batch}, {part} ms" for b in result.batches for part in ("all", "steps")]
    said = (
        f"{e.name}: {e.what}" + (f"; not timed: {e.missing}" if e.missing else "")
        for e in known.values()
    )
    columns = ("equal tokens", "largest error", "PSNR") if closeness else ()
    return Section(
        title="Contenders",
        header=("contender", "preparing ms", *batches, *columns),
        rows=tuple(rows),
        notes=(
            "Medians of the same interleaved rounds; the steps are everything but what encodes "
            "prompts and decodes the picture.",
            *said,
        ),
        topic="contenders",
    )


def _closeness(entry: Entry | None) -> tuple[str, str, str]:
    """Return how closely a contender computes what the baseline computes."""
    if entry is None or entry.max_relative_error is None:
        return NONE, NONE, NONE
    tokens = NONE if entry.token_agreement is None else percent(entry.token_agreement)
    return tokens, f"{entry.max_relative_error:.1e}", db(entry.psnr_db)


def _loop_times(batch: BatchResult, name: str) -> list[float]:
    """Return the times of all steps; zeros if the calls are unknown."""
    return batch.times(name, batch.loop_ms)


def sweep_section(result: BenchResult) -> Section:
    """Return the medians behind the plots of batch sizes and threads."""
    names = [name for name in (result.contender, result.baseline) if name]
    has_ratio = len(names) > 1 and result.trusted
    rows = []
    for point in result.sweep:
        medians = [statistics.median(point.times(name)) for name in names]
        ratio = (f"{medians[1] / medians[0]:.2f}x",) if has_ratio else ()
        each = ms(medians[0] / point.scenario.batch)
        rounds = str(len(point.times(names[0])))
        cells = (rounds, *(ms(value) for value in medians), each, *ratio)
        rows.append((point.scenario.name, *cells))
    return Section(
        title="Batch sizes and threads",
        header=(
            *("", "rounds", *(f"{n} p50 ms" for n in names), "ms per image"),
            *(("speed-up",) if has_ratio else ()),
        ),
        rows=tuple(rows),
        topic="sweep",
    )


def steps_section(result: BenchResult) -> Section:
    """Return what everybody makes of all steps: rate, share of the ceiling, ratios."""
    rows = []
    for batch in result.batches:
        if batch.loop is None:
            continue
        times = {name: _loop_times(batch, name) for name in result.contenders}
        for name in result.contenders:
            if any(times[name]):
                cells = _rate_cells(result, batch, name, times[name])
                beside = _ratio_cells(result, times, name)
                rows.append((f"{name}, batch {batch.batch}", *cells, *beside))
    floor = ("x floor",) if _has_launches(result) else ()
    ratios: tuple[str, ...] = ()
    notes = ["All steps of the loop; medians of the same rounds."]
    if result.trusted:
        ratios = (f"{result.contender} is faster",)
        if result.baseline:
            ratios = (f"times as fast as {result.baseline}", *ratios)
        notes[0] += (
            f" Ratios have 95 % intervals; the last column: how many times as fast "
            f"{result.contender} is as the contender of the line."
        )
    else:
        notes.append("No ratios, because this run is not trusted: " + "; ".join(result.warnings))
    return Section(
        title="All steps",
        header=("", "ms", "GFLOP/s", "of GEMM peak", "of GEMM beside it", *floor, *ratios),
        rows=tuple(rows),
        notes=(*notes, *_ceiling_notes(result)),
        topic="steps",
    )


def tokens_section(result: BenchResult) -> Section | None:
    """Return everybody's time per token beside the bytes that one reads; None if steps have many.

    Every token reads all weights of its stage, whatever the batch is: no token can be faster.
    """
    rows, read_mib = [], None
    for batch in result.batches:
        read_mib = batch.token_mib(result.model)
        if read_mib is None or result.ceilings is None:
            return None
        floor = Cost(gflop=0, mib=read_mib).memory_ms(result.ceilings)
        for name in result.contenders:
            if any(times := _loop_times(batch, name)):
                each = statistics.median(times) / result.model.num_tokens
                cells = (ms(each), ms(floor), f"{each / floor:.2f}")
                rows.append((f"{name}, batch {batch.batch}", *cells))
    if read_mib is None or result.ceilings is None:
        return None
    return Section(
        title="Time per token",
        header=("", "ms per token", "floor ms", "x floor"),
        rows=tuple(rows),
        notes=(
            f"All steps over {result.model.num_tokens} tokens. Floor: the {read_mib:.4g} MiB of "
            f"weights that a token reads in {result.model.precision}, at the "
            f"{result.ceilings.bandwidth_gb_s:.0f} GB/s of a copy; caches can be faster.",
        ),
        topic="steps",
    )


def _has_launches(result: BenchResult) -> bool:
    return result.ceilings is not None and result.ceilings.launch_us is not None


def _rate_cells(
    result: BenchResult, batch: BatchResult, name: str, times: Sequence[float]
) -> list[str]:
    """Return the median, its rate, and what share of the ceilings that is."""
    assert batch.loop is not None
    cost, ceilings, median = batch.loop.cost, result.ceilings, statistics.median(times)
    rate = None if cost is None else 1e3 * cost.gflop / median
    peak = None if rate is None or ceilings is None else rate / ceilings.gemm_peak_gflops
    shares = (peak, _of_products(result, batch, name))
    cells = [ms(median), NONE if rate is None else f"{rate:.0f}"]
    cells += [NONE if share is None else f"{100 * share:.0f} %" for share in shares]
    if ceilings is not None and ceilings.launch_us is not None:
        floor = batch.floor_ms(ceilings, result.model.num_layers)
        cells.append(f"{median / floor:.2f}" if cost is not None and floor else NONE)
    return cells


def _ratio_cells(result: BenchResult, times: dict[str, list[float]], name: str) -> tuple[str, ...]:
    """Return how fast a contender is beside the baseline, and the engines beside it."""
    if not result.trusted:
        return ()
    ours = _ratio(times[name], times[result.contender])
    return (_ratio(times[result.baseline], times[name]), ours) if result.baseline else (ours,)


def _ceiling_notes(result: BenchResult) -> list[str]:
    ceilings = result.ceilings
    if ceilings is None:
        return []
    notes = [
        f"GEMM peak: {ceilings.gemm_peak_gflops:.0f} GFLOP/s in {ceilings.dtype} in this run, "
        "which narrower types may pass; that is the best of all, and the rates are medians. "
        "Beside it the rate over that of one large product in the same round, median of the "
        "rounds: the speed of a shared machine changes, and both have it in common."
    ]
    if _has_launches(result):
        graph = ceilings.graph_kernel_us
        in_graph = "" if graph is None else f", {graph:.2f} us in a CUDA graph"
        notes.append(
            "Floor: for every step the longer of its operations at that rate and its bytes at "
            f"{ceilings.bandwidth_gb_s:.0f} GB/s, and the launches of few kernels a layer, an "
            f"estimate ({ceilings.launch_us:.2f} us each{in_graph})."
        )
    return notes


def _of_products(result: BenchResult, batch: BatchResult, name: str) -> float | None:
    """Return the rate of the steps over that of the products timed in the same rounds."""
    products = batch.times(GEMM)
    assert batch.loop is not None
    if batch.loop.cost is None or result.ceilings is None or not products:
        return None
    work = batch.loop.cost.gflop / product_gflop(result.ceilings.gemm_side)
    pairs = zip(_loop_times(batch, name), products, strict=True)
    return statistics.median(work * product / loop for loop, product in pairs)


def _ratio(base: Sequence[float], times: Sequence[float]) -> str:
    value, low, high = median_ratio(base, times)
    return f"{value:.2f}x" if low == high else f"{value:.2f}x [{low:.2f}, {high:.2f}]"


def guidance_section(result: BenchResult) -> Section:
    """Return what guidance on fewer scales saves, and what it changes."""
    full, median = result.guidance[0], _median_psnr
    rows = []
    for point in result.guidance:
        differing = [psnr for psnr in point.psnr_db if psnr is not None]
        rows.append(
            (
                str(point.guided_scales),
                ms(statistics.median(point.times_ms)),
                _ratio(full.times_ms, point.times_ms) if result.trusted else NONE,
                percent(point.token_agreement),
                db(median(point.psnr_db)),
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


def _median_psnr(values: Sequence[float | None]) -> float | None:
    """Return the median; equal pictures have no finite PSNR and count as better than all others.

    The lower of two in the middle, or a half that differs would be called identical.
    """
    found = statistics.median_low([float("inf") if psnr is None else psnr for psnr in values])
    return None if found == float("inf") else found
