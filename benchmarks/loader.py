"""Images per second that the data loaders give, beside what a model consumes.

    python -m nsp.benchmarks.loader --source emoji --image-size 64 --consumption 40

Measured are the map-style loader in its first epoch (every picture is decoded) and after it (from
memory), and the stream over the same pictures packed into shards in a temporary folder. The first
second of each, in which workers start, does not count.
"""

import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from torch.utils.data import DataLoader, Sampler

from nsp.benchmarks.ceilings.cpu import OtherWork
from nsp.config import Config
from nsp.console.command_line import COUNT
from nsp.console.terminal import results_console
from nsp.data.dataset import ImageDataset, batches
from nsp.data.pack import pack
from nsp.data.sources import open_source
from nsp.data.stream import ShardStream
from nsp.errors import NspError

WARMUP_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Rate(Config):
    """How fast one loader was."""

    loader: str
    num_workers: int
    images_per_s: float
    first_batch_s: float
    of_consumption: float | None  # 2: twice what the model takes


@dataclass(frozen=True, kw_only=True)
class LoaderReport(Config):
    """All rates, and what they were measured on."""

    source: str
    num_pictures: int
    image_size_px: int
    batch_size: int
    cores: int
    other_work_cores: float | None  # kept busy by other processes before
    consumption: float | None
    rates: tuple[Rate, ...]


def measure(
    source: str,
    *,
    image_size_px: int,
    batch_size: int,
    workers: Iterable[int],
    seconds: float,
    consumption: float | None,
) -> LoaderReport:
    """Return the rates of every loader with every number of workers, `seconds` each."""
    pictures = open_source(source)
    other_cores = _other_work()
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        pack(source, shards, samples_per_shard=max(1, len(pictures) // 16))
        for num_workers in workers:
            for name, loader in _loaders(source, shards, image_size_px, batch_size, num_workers):
                rate, first = _rate(loader, batch_size, seconds)
                rates.append(
                    Rate(
                        loader=name,
                        num_workers=num_workers,
                        images_per_s=rate,
                        first_batch_s=first,
                        of_consumption=rate / consumption if consumption else None,
                    )
                )
    return LoaderReport(
        source=source,
        num_pictures=len(pictures),
        image_size_px=image_size_px,
        batch_size=batch_size,
        cores=os.cpu_count() or 1,
        other_work_cores=other_cores,
        consumption=consumption,
        rates=tuple(rates),
    )


def _loaders(
    source: str, shards: Path, image_size_px: int, batch_size: int, num_workers: int
) -> Iterator[tuple[str, DataLoader[Any]]]:
    """Yield endless loaders, each made when the one before is done with."""
    for name, cache_bytes in (("map-style, decoding", 0), ("map-style, cached", 1 << 30)):
        data = ImageDataset(
            open_source(source), image_size_px, train=True, crop=True, cache_bytes=cache_bytes
        )
        if cache_bytes:
            for index in range(len(data)):  # forked workers inherit what is read here
                data[index]
        order = _Endless(len(data), batch_size)
        yield name, DataLoader(data, batch_sampler=order, num_workers=num_workers)
    stream = ShardStream(shards, image_size_px, batch_size=batch_size, train=True, crop=True)
    yield "stream", stream.loader(num_workers=num_workers)


class _Endless(Sampler[list[int]]):
    """Batches of indices in order, over and over."""

    def __init__(self, size: int, batch_size: int) -> None:
        self._size, self._batch_size = size, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        indices = itertools.cycle(range(self._size))
        while True:
            yield list(itertools.islice(indices, self._batch_size))


def _other_work() -> float | None:
    """Return how many cores others keep busy; measured before our workers start."""
    other = OtherWork()
    time.sleep(WARMUP_SECONDS)
    return other.cores()


def _rate(loader: DataLoader[Any], batch_size: int, seconds: float) -> tuple[float, float]:
    """Return images per second after the warm-up, and the seconds to the first batch."""
    began = time.perf_counter()
    found = batches(loader)
    next(found)
    first = time.perf_counter() - began
    while time.perf_counter() - began < first + WARMUP_SECONDS:
        next(found)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(found)
        count += 1
    return count * batch_size / (time.perf_counter() - started), first


def _print(report: LoaderReport) -> None:
    """Print a table, and the report as one JSON line."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("loader", "workers", "images/s", "first batch s", "x consumption"):
        table.add_column(name, justify="left" if name == "loader" else "right")
    for rate in report.rates:
        times = "-" if rate.of_consumption is None else f"{rate.of_consumption:.2f}"
        table.add_row(
            rate.loader,
            str(rate.num_workers),
            f"{rate.images_per_s:.0f}",
            f"{rate.first_batch_s:.2f}",
            times,
        )
    results_console().print(table)
    if report.other_work_cores is not None and report.other_work_cores > 0.1 * report.cores:
        click.echo(
            f"not reliable: other processes kept {report.other_work_cores:.1f} of {report.cores} "
            "cores busy before; run again on an idle machine"
        )
    click.echo(json.dumps(report.to_dict(), allow_nan=False))


@click.command()
@click.option("--source", default="emoji", show_default=True, help="Source, as for nsp data.")
@click.option("--image-size", type=COUNT, default=64, show_default=True, help="Pixels.")
@click.option("--batch-size", type=COUNT, default=64, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(0),
    multiple=True,
    default=(0, 2),
    show_default=True,
    help="Worker processes. Repeatable.",
)
@click.option("--seconds", type=float, default=5.0, show_default=True, help="For each loader.")
@click.option("--consumption", type=float, help="Images per second that the model takes.")
def main(
    *,
    source: str,
    image_size: int,
    batch_size: int,
    workers: tuple[int, ...],
    seconds: float,
    consumption: float | None,
) -> None:
    """Measure what the data loaders give."""
    try:
        report = measure(
            source,
            image_size_px=image_size,
            batch_size=batch_size,
            workers=workers,
            seconds=seconds,
            consumption=consumption,
        )
    except NspError as error:
        raise click.ClickException(str(error)) from error
    _print(report)


if __name__ == "__main__":
    main()
