"""Plots of how cost grows, and of what guidance on fewer scales saves."""

from typing import TYPE_CHECKING

import numpy as np

from nsp.benchmarks.record.result import BenchResult
from nsp.benchmarks.render.svg import INK, MARKERS, SERIES, Plot, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def tokens_plot(result: BenchResult) -> Plot:
    """Return how the time of a scale step grows with its tokens."""
    tokens = [side**2 for side in result.model.schedule]

    def paint(axes: "Axes") -> str:
        from matplotlib.ticker import LogLocator

        for number, batch in enumerate(result.batches):
            color = SERIES[number % len(SERIES)]
            ours = [row.contender.p50 for row in batch.step_rows]
            label = f"{result.contender}, batch {batch.batch}"
            axes.loglog(tokens, ours, MARKERS[number] + "-", color=color, label=label)
            theirs = [row.baseline.p50 for row in batch.step_rows if row.baseline]
            if theirs:
                label = f"{result.baseline}, batch {batch.batch}"
                axes.loglog(tokens, theirs, MARKERS[number] + ":", color=color, label=label)
        axes.set_xticks(tokens, [str(count) for count in tokens])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens of the scale")
        axes.set_ylabel("ms per step")
        axes.figure.legend(loc="outside upper center", ncols=2)
        return ""

    return draw("tokens", "Cost over tokens", "Median of the step of each scale.", 3.3, paint)


def batches_plot(result: BenchResult) -> Plot:
    """Return the time per image over the batch size, a line for every number of threads."""

    def paint(axes: "Axes") -> str:
        lines = 0
        for threads in dict.fromkeys(point.scenario.threads for point in result.sweep):
            points = [p for p in result.sweep if p.scenario.threads == threads]
            sizes = [p.scenario.batch for p in points]
            for name, dash in ((result.contender, "-"), (result.baseline, ":")):
                if name is None:
                    continue
                times = [float(np.median(p.times(name))) / p.scenario.batch for p in points]
                plural = "s" if threads > 1 else ""
                axes.plot(
                    sizes, times, MARKERS[lines // 2] + dash, color=SERIES[lines // 2],
                    label=f"{name}, {threads} thread{plural}",
                )  # fmt: skip
                lines += 1 if result.baseline else 2
        axes.set_xticks(sizes)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("images at once")
        axes.set_ylabel("ms per image")
        axes.figure.legend(loc="outside upper center", ncols=2)
        return ""

    return draw("batches", "Cost over batch size", "Medians, end to end, per image.", 3.3, paint)


def threads_plot(result: BenchResult) -> Plot:
    """Return how many times as fast as with one thread every batch size is."""
    counts = sorted({point.scenario.threads for point in result.sweep})

    def paint(axes: "Axes") -> str:
        for number, batch in enumerate(sorted({p.scenario.batch for p in result.sweep})):
            points = {p.scenario.threads: p for p in result.sweep if p.scenario.batch == batch}
            walls = [float(np.median(points[n].times(result.contender))) for n in counts]
            gains = [walls[0] / wall for wall in walls]
            axes.plot(
                counts, gains, MARKERS[number] + "-", color=SERIES[number], label=f"batch {batch}"
            )
        axes.plot(counts, counts, "--", color=INK, linewidth=1, label="perfect")
        axes.set_xticks(counts)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("threads")
        axes.set_ylabel("times as fast as with one")
        axes.figure.legend(loc="outside upper center", ncols=3)
        return ""

    return draw(
        "threads", "Gain from threads", f"Medians of {result.contender}, end to end.", 3.1, paint
    )


def guidance_plot(result: BenchResult) -> Plot:
    """Return time and PSNR over the number of guided scales; equal pictures have no PSNR."""
    points = sorted(result.guidance, key=lambda point: point.guided_scales)
    scales = [point.guided_scales for point in points]
    times = [float(np.median(point.times_ms)) for point in points]
    differing = [point for point in points if any(p is not None for p in point.psnr_db)]

    def paint(axes: "Axes") -> str:
        axes.plot(scales, times, MARKERS[0] + "-", color=SERIES[0], label="ms per image")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("ms per image")
        axes.set_xticks(scales)
        axes.set_xlabel(f"guided scales of {len(result.model.schedule)}")
        if differing:
            beside = axes.twinx()
            medians = [
                float(np.median([psnr for psnr in point.psnr_db if psnr is not None]))
                for point in differing
            ]
            beside.plot(
                [point.guided_scales for point in differing],
                medians,
                MARKERS[1] + ":",
                color=SERIES[1],
                label="PSNR, dB",
            )
            beside.set_ylabel("PSNR against full guidance, dB")
            beside.grid(visible=False)
        axes.figure.legend(loc="outside upper center", ncols=2)
        least = points[0]
        return (
            f"With {least.guided_scales} guided scales {100 * least.token_agreement:.0f} % of the "
            "tokens stay."
        )

    return draw(
        "guidance",
        "Guidance ended early",
        "Median time of one image, and median PSNR of the pictures that differ.",
        3.3,
        paint,
    )
