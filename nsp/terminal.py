"""What the commands show on a terminal, and in plain lines where there is none."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console

from nsp.runtime.gallery import GalleryProgress

_OURS = ("nsp", "export", "benchmarks")  # the packages whose information is shown
_WIDE = 200  # columns of a table that no terminal limits

logger = logging.getLogger(__name__)


def results_console() -> Console:
    """Return a console on stdout; tables are not squeezed into 80 columns when it is a pipe."""
    width = None if sys.stdout.isatty() else _WIDE
    return Console(file=sys.stdout, highlight=False, markup=False, width=width)


class _StderrLines(logging.Handler):
    """Writes each record as one line to what stderr is now (a progress bar may have taken it over).

    A warning is shown once: the same prompt may come by in several batches.
    """

    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        line = self.format(record)
        if record.levelno >= logging.WARNING:
            line = f"{record.levelname.lower()}: {line}"
            if line in self._warned:
                return
            self._warned.add(line)
        click.echo(line, err=True)


@contextmanager
def logs_on_stderr(*, verbose: bool) -> Iterator[None]:
    """Show our log records, and everybody's warnings, until the block ends."""
    handler, root = _StderrLines(), logging.getLogger()
    before = {name: logging.getLogger(name).level for name in _OURS}
    root.addHandler(handler)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def gallery_progress() -> Iterator[Callable[[GalleryProgress], None]]:
    """Yield what shows a gallery's progress: a bar over scales, or a line per finished batch."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _log_batch
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("scales"),
    )
    with Progress(*columns, console=console, redirect_stdout=False, transient=True) as bar:
        task = bar.add_task("loading", total=None)

        def show(progress: GalleryProgress) -> None:
            first, last = progress.images_done + 1, progress.images_done + progress.batch
            bar.update(
                task,
                description=f"images {first}-{last} of {progress.images}",
                completed=progress.scale,
                total=progress.num_scales,
            )

        yield show


def _log_batch(progress: GalleryProgress) -> None:
    """Log a batch whose last scale is done."""
    if progress.scale == progress.num_scales:
        done = progress.images_done + progress.batch
        logger.info("generated %d of %d images", done, progress.images)
