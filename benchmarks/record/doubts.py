"""Reasons to doubt a benchmark's numbers, shown before all of them."""

from collections.abc import Iterator

from nsp.benchmarks.ceilings.cpu import Ceilings, Environment
from nsp.benchmarks.record.result import BatchResult

NOISE_SPREAD = 0.25  # of the median, from p10 to p90
NOISE_DRIFT = 0.15  # of the ceilings, from before to after
NOISE_WORK = 0.1  # of all cores, by other processes


def doubts(
    environment: Environment,
    other_cores: float | None,
    ceilings: Ceilings | None,
    batches: tuple[BatchResult, ...],
) -> Iterator[str]:
    """Yield what makes the numbers doubtful."""
    cores = environment.logical_cores
    if other_cores is not None and other_cores > NOISE_WORK * cores:
        yield (
            f"other processes kept {other_cores:.1f} of {cores} cores busy: times and even ratios "
            "are not reliable, because threads wait for each other; run again on an idle machine"
        )
    if ceilings is not None and ceilings.drift > NOISE_DRIFT:
        yield (
            f"the machine's speed changed by {100 * ceilings.drift:.0f} % during the benchmark; "
            "fractions of the roof are not reliable"
        )
    for batch in batches:
        for name, times in (
            ("the engines", batch.end_to_end.candidate),
            ("the baseline", batch.end_to_end.baseline),
        ):
            if times is not None and times.spread > NOISE_SPREAD:
                yield (
                    f"batch {batch.batch}: the times of {name} spread by "
                    f"{100 * times.spread:.0f} % from p10 to p90; run again on an idle machine"
                )
