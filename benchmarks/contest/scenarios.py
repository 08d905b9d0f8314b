"""What is timed, as plain records: the batches of the tables, and the sweep behind the plots."""

from collections.abc import Sequence
from dataclasses import dataclass

from nsp.config import Config

SWEEP_BATCHES = (1, 2, 4, 8)
SWEEP_THREADS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Scenario(Config):
    """One workload: so many images at once on so many threads, other settings being the model's."""

    name: str
    batch: int
    threads: int


def batch_scenarios(batch_sizes: Sequence[int], *, threads: int) -> tuple[Scenario, ...]:
    """Return a scenario for every batch size."""
    return tuple(Scenario(name=f"batch {n}", batch=n, threads=threads) for n in batch_sizes)


def sweep_scenarios(*, cores: int, max_batch: int | None) -> tuple[Scenario, ...]:
    """Return every pair of threads and batch size that this machine and the engines take."""
    return tuple(
        Scenario(name=f"batch {batch}, threads {threads}", batch=batch, threads=threads)
        for threads in SWEEP_THREADS
        if threads <= cores
        for batch in SWEEP_BATCHES
        if max_batch is None or batch <= max_batch
    )
