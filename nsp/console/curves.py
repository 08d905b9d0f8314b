"""`python -m nsp.console.curves`: the course of a training, as a picture for a model card.

Takes the log.jsonl of phases, as the trainer writes them, in the order they ran. Logs of the same
phase (the folder's name) follow one another in one plot: runs that went on from one another.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from nsp.console.common_options import FILE
from nsp.errors import DataError, MissingExtraError, NspError
from nsp.files import write_file

# What is drawn of a phase: the first of these that it reports.
_METRICS = {"psnr_db": "PSNR, dB", "ce": "cross-entropy, nats per token", "loss": "loss"}
_SMOOTHED = 15  # reports behind every point of the thick line


@dataclass(frozen=True)
class Curve:
    """One phase: reports (N,) over steps (N,), and the held-out ones, steps counted on."""

    phase: str
    metric: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    held_out_steps: NDArray[np.int64]
    held_out: NDArray[np.float64]
    joints: tuple[int, ...]  # steps where another run went on


def read_curves(logs: Sequence[Path]) -> list[Curve]:
    """Return a curve per phase; DataError for a file that is not a log of a phase."""
    by_phase: dict[str, list[list[dict[str, Any]]]] = {}
    for log in logs:
        by_phase.setdefault(log.parent.name, []).append(_rows(log))
    return [_curve(phase, runs) for phase, runs in by_phase.items()]


def _rows(log: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{log} is not a log of a training phase: {error}") from error
    if not rows or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise DataError(f"{log} is not a log of a training phase: lines without a step")
    return rows


def _curve(phase: str, runs: Sequence[Sequence[dict[str, Any]]]) -> Curve:
    """Return the reports of runs that went on from one another."""
    metric = next(
        (name for name in _METRICS if any(name in row for run in runs for row in run)), None
    )
    if metric is None:
        raise DataError(f"the logs of phase {phase} report none of {', '.join(_METRICS)}")
    begin, joints = 0, []
    trained: list[tuple[int, float]] = []
    held_out: list[tuple[int, float]] = []
    for run in runs:
        for row in run:
            if metric in row:
                trained.append((begin + row["step"], row[metric]))
            if f"held_out_{metric}" in row:
                held_out.append((begin + row["step"], row[f"held_out_{metric}"]))
        begin += max(row["step"] for row in run)
        joints.append(begin)
    steps, values = _columns(trained)
    held_out_steps, held_out_values = _columns(held_out)
    return Curve(phase, metric, steps, values, held_out_steps, held_out_values, tuple(joints[:-1]))


def _columns(points: Iterable[tuple[int, float]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    pairs = list(points)
    steps = np.array([step for step, _ in pairs], np.int64)
    return steps, np.array([value for _, value in pairs], np.float64)


def smoothed(values: NDArray[np.float64], width: int = _SMOOTHED) -> NDArray[np.float64]:
    """Return the running median (N,) over `width` reports; fewer at both ends."""
    half = width // 2
    return np.array(
        [np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    )


def draw(curves: Sequence[Curve], file: Path) -> None:
    """Write the plots side by side; the file's ending says the format, as Matplotlib knows it."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "bench") from error
    figure = Figure(figsize=(4.6 * len(curves), 3.2), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        axes.plot(curve.steps, curve.values, color="#9ec5ee", linewidth=0.8)
        axes.plot(curve.steps, smoothed(curve.values), color="#1c5cab", label="training")
        if len(curve.held_out):
            axes.plot(curve.held_out_steps, curve.held_out, color="#c2570c", label="held out")
        for joint in curve.joints:
            axes.axvline(joint, color="#888888", linewidth=0.8, linestyle=":")
        axes.set_title(curve.phase)
        axes.set_xlabel("steps")
        axes.set_ylabel(_METRICS[curve.metric])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with write_file(file) as partial:
        figure.savefig(partial, format=file.suffix.lstrip(".") or "png", dpi=110)


@click.command()
@click.argument("logs", nargs=-1, required=True, type=FILE)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Picture to write, as PNG, SVG or PDF.",
)
def main(logs: tuple[Path, ...], output: Path) -> None:
    """Draw the course of phases from their LOGS, in the order they ran."""
    try:
        draw(read_curves(logs), output)
    except (NspError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"picture: {output}")


if __name__ == "__main__":
    main()
