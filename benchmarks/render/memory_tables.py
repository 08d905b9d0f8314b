"""The tables of fresh processes: start-up and memory."""

import statistics
from collections.abc import Sequence

from nsp.benchmarks.record.cold import ColdRun
from nsp.benchmarks.record.result import BenchResult, Footprint
from nsp.benchmarks.render.section import NONE, Section, ms


def cold_section(result: BenchResult) -> Section:
    """Return start-up and memory of both sides."""
    names = dict.fromkeys(run.contender for run in result.cold_runs)
    rows = []
    for name in names:
        runs = [run for run in result.cold_runs if run.contender == name]
        rows.append((name, str(len(runs)), *_cold_cells(runs), _weights(result, name), _gpu(runs)))
    batch = result.cold_runs[0].batch
    on_gpu = any(run.gpu_peak_mib is not None for run in result.cold_runs)
    return Section(
        title=f"Cold start and memory, batch {batch}",
        header=(
            "backend",
            "processes",
            "imported ms",
            "loaded ms",
            "first step ms",
            "image ms",
            "first call ms",
            "loaded MiB",
            "peak MiB",
            "weight files MiB",
            "GPU peak MiB",
        )[: None if on_gpu else -1],
        rows=tuple(row if on_gpu else row[:-1] for row in rows),
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
        ms(median("imported_ms")),
        ms(median("loaded_ms")),
        ms(median("first_step_ms")),
        ms(median("image_ms")),
        ms(median("first_call_ms")),
        f"{median('loaded_mib'):.0f}",
        f"{median('peak_mib'):.0f}",
    )


def footprint_section(result: BenchResult, counted: Footprint) -> Section:
    """Return the counted memory beside the measured peak, without the process's own."""
    runs = [run for run in result.cold_runs if run.contender == result.contender]
    peak = statistics.median(run.peak_mib for run in runs)
    own = statistics.median(run.imported_mib for run in runs)
    measured = peak - own
    rows = (
        ("weights", f"{counted.weights_mib:.1f}"),
        ("KV arena", f"{counted.arena_mib:.1f}"),
        ("scratch", f"{counted.scratch_mib:.1f}"),
        ("counted", f"{counted.total_mib:.1f}"),
        ("measured", f"{measured:.1f}"),
        ("measured over counted", f"{100 * (measured / counted.total_mib - 1):+.0f} %"),
    )
    return Section(
        title=f"Memory of {result.contender}, counted and measured, batch {runs[0].batch}",
        header=("", "MiB"),
        rows=rows,
        notes=(
            f"Measured: the peak of {peak:.0f} MiB without the {own:.0f} MiB a process has before "
            "the model is loaded (interpreter, libraries). Scratch is counted: the widest moment "
            "of every stage and its outputs, float32.",
        ),
        topic="memory",
    )


def first_calls_section(result: BenchResult) -> Section:
    """Return the first call of every stage and by how much memory grew up to the end of it."""
    told = [run for run in result.cold_runs if run.stage_ms]
    names = list(dict.fromkeys(run.contender for run in told))
    rows = []
    for stage in told[0].stage_ms:
        cells = []
        for name in names:
            runs = [run for run in told if run.contender == name]
            cells.append(ms(statistics.median(run.stage_ms[stage] for run in runs)))
            cells.append(f"{statistics.median(run.stage_growth_mib(stage) for run in runs):.1f}")
        rows.append((stage, *cells))
    return Section(
        title="First call of every stage, batch 1",
        header=("stage", *(f"{name} {unit}" for name in names for unit in ("ms", "+MiB"))),
        rows=tuple(rows),
        notes=("Loading in the background counts into the call that waits for it.",),
        topic="memory",
    )


def _gpu(runs: Sequence[ColdRun]) -> str:
    """Return the peak of the whole GPU's memory while they ran."""
    found = [run.gpu_peak_mib for run in runs if run.gpu_peak_mib is not None]
    return f"{statistics.median(found):.0f}" if found else NONE


def _weights(result: BenchResult, name: str) -> str:
    size = result.model.weights_mib.get(name)
    return NONE if size is None else f"{size:.1f}"
