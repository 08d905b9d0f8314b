"""How far a phase is: a bar on a terminal, log lines elsewhere, and a JSON line per report."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from nsp.training.config import PhaseConfig

logger = logging.getLogger(__name__)

_SHOWN = 4  # metrics on the bar


class Progress:
    """Reports metrics every `log_every` steps, no oftener: reading them waits for the device."""

    def __init__(self, config: PhaseConfig, start: int, log_path: Path) -> None:
        self.config, self.start = config, start
        self._log = log_path.open("a")
        console = Console(file=sys.stderr)
        self._bar: Bar | None = None
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
                config.name, total=config.steps, completed=start, metrics=""
            )
        self._since, self._since_step = time.monotonic(), start

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
        self._log.close()

    def advance(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Count one finished step; `step` steps are done now."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step % self.config.log_every and step != self.config.steps:
            return
        values = {name: float(value) for name, value in metrics.items()}
        now = time.monotonic()
        values["steps_per_s"] = (step - self._since_step) / max(now - self._since, 1e-9)
        self._since, self._since_step = now, step
        self._log.write(json.dumps({"step": step, **values}) + "\n")
        self._log.flush()
        shown = [f"{name} {value:.4g}" for name, value in list(values.items())[:_SHOWN]]
        shown.append(f"{values['steps_per_s']:.2f} steps/s")
        if self._bar is not None:
            self._bar.update(self._task, metrics="  ".join(shown))
        elif step % (10 * self.config.log_every) == 0 or step == self.config.steps:
            left = (self.config.steps - step) / max(values["steps_per_s"], 1e-9)
            logger.info(
                "%s %d/%d  %s  %.0f s left",
                self.config.name,
                step,
                self.config.steps,
                "  ".join(shown),
                left,
            )
