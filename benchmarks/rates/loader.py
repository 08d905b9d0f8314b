"""Images per second that the data loaders give, beside what a model consumes.

    nsp bench loader --source emoji --image-size 64 --consumption 40

Measured are the map-style loader in its first epoch (every picture is decoded) and after it (from
memory), and the stream over the same pictures packed into shards in a temporary folder. The first
second of each, in which workers start, does not count.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Sampler

from nsp.benchmarks.record.doubts import busy
from nsp.benchmarks.record.environment import OtherWork
from nsp.benchmarks.render.section import NONE, Section
from nsp.config import Config
from nsp.data.dataset import ImageDataset, batches
from nsp.data.pack import pack
from nsp.data.sources import open_source
from nsp.data.stream import ShardStream
from nsp.values import real

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
    trusted: bool
    warnings: tuple[str, ...]  # why not
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
    seconds = real("seconds", seconds, least=0.01, most=3600)  # NaN would never end
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
    cores = os.cpu_count() or 1
    warnings = tuple(busy(other_cores, cores))
    return LoaderReport(
        source=source,
        num_pictures=len(pictures),
        image_size_px=image_size_px,
        batch_size=batch_size,
        cores=cores,
        other_work_cores=other_cores,
        trusted=not warnings,
        warnings=warnings,
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


def section(report: LoaderReport) -> Section:
    """Return the table for people, with what makes it doubtful."""
    rows = [
        (
            rate.loader,
            str(rate.num_workers),
            f"{rate.images_per_s:.0f}",
            f"{rate.first_batch_s:.2f}",
            NONE if rate.of_consumption is None else f"{rate.of_consumption:.2f}",
        )
        for rate in report.rates
    ]
    return Section(
        title=f"Loaders of {report.source}, {report.image_size_px} px",
        header=("loader", "workers", "images/s", "first batch s", "x consumption"),
        rows=tuple(rows),
        notes=report.warnings,
    )
