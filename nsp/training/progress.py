"""The progress of a phase: a bar on a terminal, log lines elsewhere, a JSON line per report."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from nsp.family.recipe import PhaseConfig, counted
from nsp.files import write_file

logger = logging.getLogger(__name__)

_SHOWN = 4  # metrics shown on the bar
_LINES_APART = 10  # reports between two log lines when there is no terminal


class Progress:
    """Shows and records the numbers of a phase; a silent one (not the first process) does neither.

    Reports of steps after `start` are deleted: an earlier process made them before it was killed.
    """

    def __init__(
        self,
        config: PhaseConfig,
        start: int,
        log_path: Path,
        *,
        flops_per_image: float = 0.0,
        silent: bool = False,
    ) -> None:
        self.config, self._silent, self._flops = config, silent, flops_per_image
        self._since, self._since_step = time.monotonic(), start
        self._bar: Bar | None = None
        if silent:
            return
        _forget(log_path, start)
        self._log = log_path.open("a")
        console = Console(file=sys.stderr)
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=console,
            )
            self._task = self._bar.add_task(
                config.name, total=counted(config.steps), completed=start, metrics=""
            )

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the bar and the log."""
        if self._bar is not None:
            self._bar.stop()
        if not self._silent:
            self._log.close()

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block in the rates, because it is not part of a step."""
        begun = time.monotonic()
        yield
        self._since += time.monotonic() - begun

    def note(self, step: int, **facts: str | float | int | None) -> None:
        """Record a line about an event that is not one of the usual numbers."""
        if not self._silent:
            self._log.write(json.dumps({"step": step, **facts}) + "\n")
            self._log.flush()

    def report(
        self, step: int, metrics: Mapping[str, float], *, work: float = 1.0
    ) -> dict[str, float]:
        """Show and record the numbers of the last finished step; return them with the throughput.

        `work` is the fraction of a full step's operations that these steps needed.
        """
        now = time.monotonic()
        rate = (step - self._since_step) / max(now - self._since, 1e-9)
        self._since, self._since_step = now, step
        values = {**metrics, "steps_per_s": rate, "images_per_s": rate * self.config.batch_size}
        if self._flops:
            values["tflops_per_s"] = 1e-12 * self._flops * work * values["images_per_s"]
        if self._silent:
            return values
        self.note(step, **values)
        shown = [f"{name} {value:.4g}" for name, value in list(metrics.items())[:_SHOWN]]
        shown.append(f"{values['images_per_s']:.3g} images/s")
        line = "  ".join(shown)
        if self._bar is not None:
            self._bar.update(self._task, metrics=line)
        elif step % (_LINES_APART * self.config.log_every) == 0 or step == self.config.steps:
            name, steps = self.config.name, counted(self.config.steps)
            left = (steps - step) / max(rate, 1e-9)
            logger.info("%s %d/%d  %s  %.0f s left", name, step, steps, line, left)
        return values


def _forget(log_path: Path, start: int) -> None:
    """Delete the lines about steps after `start`, and an incomplete last line."""
    if not log_path.exists():
        return
    kept = []
    for line in log_path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with write_file(log_path) as partial:
        partial.write_text("".join(kept))
