"""Shows progress, logs and tables on a terminal, or as plain lines without one.

rich is imported only when something is drawn, while `nsp generate` already loads engines.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import click

from nsp.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_OURS = "nsp"  # the package whose log messages of level INFO are shown
_WIDE = 200  # columns of a table without a terminal
QUIET_SECONDS = 30.0  # without a terminal; then a line says what is going on
_DRAW_SECONDS = 0.1  # drawing a bar takes about a millisecond

logger = logging.getLogger(__name__)


def results_console() -> "Console":
    """Return a console on stdout; if that is a pipe, tables may be wider than 80 columns."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDE
    return Console(file=sys.stdout, highlight=False, markup=False, width=width)


def print_json(value: Any) -> None:
    """Print a JSON document on stdout."""
    click.echo(json.dumps(value, indent=1))


def print_tables(tables: "Iterable[RenderableType]") -> None:
    """Print rich tables on stdout."""
    console = results_console()
    for table in tables:
        console.print(table)


class _StderrLines(logging.Handler):
    """Writes each record as one line to the present stderr (a progress bar may have replaced it).

    A warning is shown once: the same prompt may occur in several batches.
    """

    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        line = self.format(record)
        if not record.exc_info:
            line = one_line(line)
        if record.levelno >= logging.WARNING:
            line = f"{record.levelname.lower()}: {line}"
            if line in self._warned:
                return
            self._warned.add(line)
        click.echo(line, err=True)


@contextmanager
def logs_on_stderr(*, verbose: bool) -> Iterator[None]:
    """Show our log records, and the warnings of all packages, until the block ends."""
    handler, root = _StderrLines(), logging.getLogger()
    ours = logging.getLogger(_OURS)
    before = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(before)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield `show(activity, done, total)`: a bar on a terminal, a line per activity elsewhere.

    Nothing is drawn between its calls, so that drawing does not disturb measurements; only where no
    line was written for half a minute, one says what goes on.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        with _ActivityLines() as lines:
            yield lines
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    with Progress(
        TextColumn(
            "{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        ),
        BarColumn(bar_width=24),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        console=Console(file=sys.stderr),
        auto_refresh=False,
        redirect_stdout=False,
        transient=True,
        expand=True,
    ) as bar:
        task, drawn = bar.add_task("", total=None, visible=False), 0.0

        def show(activity: str, done: int, total: int) -> None:
            nonlocal drawn
            now = time.monotonic()
            due = done == total or now - drawn > _DRAW_SECONDS
            drawn = now if due else drawn
            bar.update(
                task,
                description=escape(activity),
                completed=done,
                total=total,
                visible=True,
                refresh=due,
            )

        yield show


class _ActivityLines:
    """Logs every activity once, and what is going on after `QUIET_SECONDS` without a line."""

    def __init__(self) -> None:
        self._last, self._amount = "", ""
        self._began = time.monotonic()
        self._logged, self._ended = threading.Event(), threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._remind, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._logged.set()  # wakes the thread

    def __call__(self, activity: str, done: int, total: int) -> None:
        """Log `activity` when it changed."""
        self._amount = f"{done} of {total}"
        if activity != self._last:
            self._last, self._began = activity, time.monotonic()
            self._logged.set()
            logger.info("%s", activity)

    def _remind(self) -> None:
        while not self._ended.is_set():
            if self._logged.wait(QUIET_SECONDS):
                self._logged.clear()
            elif self._last:
                seconds = time.monotonic() - self._began
                logger.info("%s: %s, for %.0f s", self._last, self._amount, seconds)
