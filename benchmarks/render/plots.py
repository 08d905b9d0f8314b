"""What the report plots of a result."""

import itertools
from typing import TYPE_CHECKING

import numpy as np

from nsp.benchmarks.ceilings.rates import Ceilings
from nsp.benchmarks.record.parity import Parity
from nsp.benchmarks.record.result import LOOP, BatchResult, BenchResult, Row
from nsp.benchmarks.record.times import median_ratio
from nsp.benchmarks.render.growth_plots import (
    batches_plot,
    guidance_plot,
    threads_plot,
    tokens_plot,
)
from nsp.benchmarks.render.section import ms
from nsp.benchmarks.render.svg import FAINT, INK, MARKERS, SERIES, Plot, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plots(result: BenchResult) -> list[Plot]:
    """Return every plot there are data for, in reading order."""
    first = result.batches[0]
    made = [_waterfall(result, first)]
    if result.trusted and len(result.contenders) > 1:
        made.append(_speedups(result))
    ceilings = result.ceilings
    if ceilings is not None and any(row.cost and row.cost.gflop for row in first.stage_rows):
        made.append(_roofline(result, ceilings))
    if result.parity is not None:
        made.append(_parity(result.parity))
        if result.parity.flips:
            made.append(_flips(result.parity))
    if result.cold_runs:
        made.append(_memory(result))
    if len(first.step_rows) == len(result.model.schedule) > 1:
        made.append(tokens_plot(result))
    if result.sweep:
        made += [batches_plot(result), *([threads_plot(result)] if result.trusted else [])]
    if result.guidance:
        made.append(guidance_plot(result))
    return made


def _waterfall(result: BenchResult, batch: BatchResult) -> Plot:
    """Return when every stage of every step runs, at medians, one line per part."""
    stages = list(dict.fromkeys(row.name for row in batch.stage_rows))
    colors = dict(zip(stages, itertools.cycle(SERIES), strict=False))
    names = [name for name in (result.contender, result.baseline) if name]
    lanes_of = {name: _lanes(batch, name) for name in names}
    longest = max(len(lanes) for lanes in lanes_of.values())

    def paint(axes: "Axes") -> str:
        labels: list[str] = []
        for offset, name in zip((0.0, 0.42), names, strict=False):
            lanes = lanes_of[name]
            labels = [label for label, _ in lanes]
            at = 0.0
            for lane, (_, parts) in enumerate(lanes):
                for stage, took in parts:
                    color = colors.get(stage, FAINT)
                    axes.barh(
                        lane + offset,
                        took,
                        left=at,
                        height=0.36,
                        color=color,
                        alpha=1 if name == result.contender else 0.45,
                    )
                    at += took
            axes.text(at, len(lanes) - 1 + offset, f" {name} {ms(at)} ms", va="center", fontsize=9)
        axes.set_yticks([n + 0.2 for n in range(len(labels))], labels)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(right=axes.get_xlim()[1] * 1.3)
        axes.set_xlabel("ms since the prompt arrived")
        for stage, color in colors.items():
            axes.barh(0, 0, color=color, label=stage)
        axes.figure.legend(loc="outside upper center", ncols=3)
        return ""

    pale = f" Solid is {result.contender}, pale {result.baseline}." if result.baseline else ""
    return draw(
        "waterfall",
        f"Where the time goes, batch {batch.batch}",
        f"Median time of every stage, step by step, one after the other.{pale}",
        1.5 + 0.36 * longest,
        paint,
    )


def _lanes(batch: BatchResult, name: str) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return (label, [(stage, ms)]) line by line: every part in order, then the rest."""
    measured = [o for o in batch.observations if o.contender == name and not o.warmup]
    if any(o.loop_ms is not None for o in measured):  # the calls are unknown
        loop = float(np.median(batch.times(name, batch.loop_ms)))
        rest = float(np.median(batch.times(name))) - loop
        return [(LOOP, [(LOOP, loop)]), ("outside", [("outside", max(rest, 0.0))])]
    lanes = []
    for part in batch.parts:
        found = [
            (stage, float(np.median([sum(o.stage_ms.get(stage, ())[a:b]) for o in measured])))
            for stage, (a, b) in part.calls.items()
        ]
        lanes.append((part.name, found))
    outside = float(np.median(batch.times(name, lambda o: o.outside_ms)))
    return [*lanes, ("outside", [("outside", max(outside, 0.0))])]


def _speedups(result: BenchResult) -> Plot:
    """Return how many times as fast as the baseline everybody is, with intervals."""
    reference = result.baseline or result.contender
    names = list(result.contenders)

    def paint(axes: "Axes") -> str:
        said = []
        height = 0.8 / len(result.batches)
        for number, batch in enumerate(result.batches):
            base = batch.times(reference)
            for lane, name in enumerate(names):
                value, low, high = median_ratio(base, batch.times(name))
                at = lane + (number - (len(result.batches) - 1) / 2) * height
                label = f"batch {batch.batch}" if not lane else None
                axes.barh(
                    at,
                    value,
                    height * 0.88,
                    color=SERIES[number % len(SERIES)],
                    label=label,
                    xerr=[[value - low], [high - value]],
                    ecolor=INK,
                    capsize=2,
                )
                axes.annotate(
                    f"{value:.2f}×",
                    (high, at),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
                if name != reference:
                    said.append(f"{name} at batch {batch.batch}: {value:.2f} times.")
        axes.axvline(1, color=FAINT, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, axes.get_xlim()[1] * 1.15)
        axes.set_xlabel(f"times as fast as {reference}, end to end")
        axes.figure.legend(loc="outside upper center", ncols=3)
        return " ".join(said)

    return draw(
        "speedups",
        "Speed beside the baselines",
        "Medians over interleaved rounds; whiskers: 95 % intervals (bootstrap over rounds).",
        1.3 + 0.3 * len(names) * max(1.4, len(result.batches)),
        paint,
    )


def _roofline(result: BenchResult, ceilings: Ceilings) -> Plot:
    """Return every stage's rate over its operations per byte, under this run's ceilings."""

    def paint(axes: "Axes") -> str:
        points: list[tuple[float, float]] = []
        for number, batch in enumerate({b.batch: b for b in result.batches}.values()):
            color = SERIES[number % len(SERIES)]
            steps = [_intensity(row) for row in batch.step_rows if row.cost and row.cost.gflop]
            xy = list(zip(*steps, strict=True)) or [(), ()]
            axes.plot(*xy, "o-", color=color, label=f"batch {batch.batch}")
            points += steps
            for kind, row in enumerate(_counted_stages(batch)):
                point = _intensity(row)
                label = row.name if not number else None
                axes.plot(*point, MARKERS[1 + kind], color=color, markersize=7, markeredgecolor=INK)
                axes.plot([], [], MARKERS[1 + kind], color=FAINT, label=label)
                points.append(point)
        peak, bandwidth = ceilings.gemm_peak_gflops, ceilings.bandwidth_gb_s
        left = min(x for x, _ in points) / 2
        right = max(4 * peak / bandwidth, 2 * max(x for x, _ in points))
        xs = np.geomspace(left, right, 200)
        axes.plot(xs, np.minimum(peak, xs * bandwidth), color=INK, linewidth=1.4)
        top = f"GEMM peak {peak:.0f} GFLOP/s, memory {bandwidth:.0f} GB/s"
        axes.text(right, 1.15 * peak, top, ha="right", fontsize=9)
        axes.set(xscale="log", yscale="log")
        axes.set_ylim(top=peak * 2.2, bottom=min(y for _, y in points) / 2.5)
        axes.set_xlabel("floating-point operations per byte moved")
        axes.set_ylabel("GFLOP/s")
        axes.figure.legend(loc="outside upper center", ncols=3)
        return f"The roof: {peak:.0f} GFLOP/s, reached from {peak / bandwidth:.1f} FLOP per byte."

    return draw(
        "roofline",
        "How near to the machine's ceilings",
        f"Rates of {result.contender} at medians under the GEMM peak and the memory bandwidth "
        "measured in this run. Lines join the steps, in order. Caches let "
        "small stages rise above the slope.",
        3.9,
        paint,
    )


def _counted_stages(batch: BatchResult) -> list[Row]:
    """Return the rows of stages with counted work, but for those whose steps have rows."""
    in_steps = {stage for part in batch.parts if part.unit for stage in part.calls}
    shown = [row for row in batch.stage_rows if not (batch.step_rows and row.name in in_steps)]
    return [row for row in shown if row.cost and row.cost.gflop]


def _intensity(row: Row) -> tuple[float, float]:
    """Return operations per byte, and GFLOP/s at the median."""
    assert row.cost is not None
    return (
        1e9 * row.cost.gflop / (row.cost.mib * 2**20),
        1e3 * row.cost.gflop / row.contender.p50,
    )


def _parity(parity: Parity) -> Plot:
    """Return error and divergence of every part of the loop."""
    names = [step.name for step in parity.steps]
    what = "logits" if any(step.logits_range for step in parity.steps) else "latents"
    errors = [step.max_relative_error for step in parity.steps]
    series = [(f"largest error of the {what}, of their range", errors)]
    if all(step.kl_mean is not None for step in parity.steps):
        divergence = [step.kl_mean or 0.0 for step in parity.steps]
        series.append(("KL divergence, nats per token", divergence))

    fed = "with the same tokens fed to both" if parity.forced else "with the same random numbers"

    def paint(axes: "Axes") -> str:
        for number, (label, values) in enumerate(series):
            shown = [value or float("nan") for value in values]  # zero has no place on a log axis
            axes.plot(names, shown, MARKERS[number] + "-", color=SERIES[number], label=label)
        if any(value for _, values in series for value in values):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        if len(names) > 12:
            axes.set_xticks(axes.get_xticks()[:: len(names) // 4])
        axes.figure.legend(loc="outside upper center")
        shares = [step.token_agreement for step in parity.steps]
        known = [share for share in shares if share is not None]
        if not known:
            return ""
        return f"The step with the fewest equal tokens has {100 * min(known):.2f} % of them."

    return draw(
        "parity",
        f"How closely the {what} agree",
        f"{parity.contender} against {parity.baseline}, {fed}. Exact zeros are left out.",
        3.1,
        paint,
    )


def _flips(parity: Parity) -> Plot:
    """Return every flip's margin against the measured error that must explain it."""

    def paint(axes: "Axes") -> str:
        errors = np.array([flip.cdf_error for flip in parity.flips])
        margins = np.array([max(flip.margin, 1e-9) for flip in parity.flips])
        axes.loglog(errors, margins, "o", color=SERIES[0], alpha=0.8, markersize=5)
        low = 0.5 * min(errors.min(), margins.min())
        ends = [low, 2 * max(errors.max(), margins.max())]
        axes.plot(ends, ends, "--", color=INK, label="margin = error")
        axes.set_xlabel("largest difference of the two distributions")
        axes.set_ylabel("margin of the draw")
        axes.figure.legend(loc="outside upper center")
        return f"{sum(f.explained for f in parity.flips)} of {len(parity.flips)} lie below it."

    return draw(
        "flips",
        "Tokens that flipped",
        "Below the line the measured error is large enough to move the draw.",
        3.1,
        paint,
    )


def _memory(result: BenchResult) -> Plot:
    """Return resident memory of fresh processes beside the weights on disk."""
    names = list(dict.fromkeys(run.contender for run in result.cold_runs))
    parts = (
        ("after imports", "imported_mib"),
        ("after loading", "loaded_mib"),
        ("peak", "peak_mib"),
    )

    def paint(axes: "Axes") -> str:
        for number, (label, field) in enumerate(parts):
            values = [
                float(np.median([getattr(r, field) for r in result.cold_runs if r.contender == n]))
                for n in names
            ]
            places = np.arange(len(names)) + (number - 1) * 0.27
            axes.barh(places, values, 0.24, color=SERIES[number], label=label)
            for place, value in zip(places, values, strict=True):
                axes.text(value, place, f" {value:.0f}", va="center", fontsize=9)
        for lane, name in enumerate(names):
            size = result.model.weights_mib.get(name)
            if size is not None:
                axes.plot([size, size], [lane - 0.42, lane + 0.42], color=INK, linewidth=2)
        axes.plot([], [], color=INK, linewidth=2, label="weight files")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
        axes.set_xlabel("resident memory, MiB")
        axes.figure.legend(loc="outside upper center", ncols=2)
        return ""

    return draw(
        "memory",
        "Memory of a fresh process",
        "Medians; shared libraries are included, so what imports bring is shown apart.",
        1.3 + 0.8 * len(names),
        paint,
    )
