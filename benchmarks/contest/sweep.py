"""How cost grows with images at once and with threads: every scenario loaded and timed alike."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from nsp.benchmarks.contest.rounds import Contestant, interleaved
from nsp.benchmarks.contest.scenarios import Scenario
from nsp.benchmarks.contest.subject import Subject, torch_threads
from nsp.benchmarks.record.result import SweepPoint

Load = Callable[[int], Subject]  # threads -> both sides, loaded for so many


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
        contestants = [Contestant(side.name, side.pipeline) for side in subject.sides]
        with torch_threads(subject, threads):
            for scenario in group:
                on_start(f"sweep: {scenario.name}", done, len(scenarios))
                request = subject.request(scenario.batch, seed)
                observations = interleaved(
                    contestants,
                    request,
                    rounds=rounds,
                    warmup=warmup,
                    max_seconds=seconds_per_batch,
                )
                yield SweepPoint(scenario=scenario, observations=tuple(observations))
                done += 1
