"""How cost grows with images at once and with threads: every scenario loaded and timed alike."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from nsp.benchmarks.contest.rounds import Runner, interleaved
from nsp.benchmarks.contest.subject import Subject, torch_threads
from nsp.benchmarks.record.result import Scenario, SweepPoint

SWEEP_BATCHES = (1, 2, 4, 8)
SWEEP_THREADS = (1, 2)

Load = Callable[[int], Subject]  # threads -> both sides, loaded for so many


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


def sweep(
    load: Load,
    scenarios: Sequence[Scenario],
    *,
    rounds: int,
    warmup: int,
    seed: int,
    seconds_per_batch: float,
    on_start: Callable[[str, int, int], None],
) -> Iterator[SweepPoint]:
    """Yield the raw times of every scenario, engines and baseline interleaved.

    Engines are given their number of threads when they are loaded, so a subject serves all batch
    sizes of one number.
    """
    done = 0
    for threads, group in groupby(scenarios, key=lambda scenario: scenario.threads):
        subject = load(threads)
        contenders = [
            Runner(side.name, side.pipeline, device=subject.device) for side in subject.sides
        ]
        with torch_threads(subject, threads):
            for scenario in group:
                on_start(f"sweep: {scenario.name}", done, len(scenarios))
                request = subject.request(scenario.batch, seed)
                observations = interleaved(
                    contenders,
                    request,
                    rounds=rounds,
                    warmup=warmup,
                    max_seconds=seconds_per_batch,
                )
                yield SweepPoint(scenario=scenario, observations=tuple(observations))
                done += 1
