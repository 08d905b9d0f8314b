"""Reasons to doubt a benchmark's numbers, shown before all of them.

With any of them a result is not trusted: no ratio of it is told.
"""

import statistics
from collections.abc import Iterator

from nsp.benchmarks.ceilings.product import GEMM, product_gflop
from nsp.benchmarks.ceilings.rates import Ceilings
from nsp.benchmarks.record.environment import Environment
from nsp.benchmarks.record.result import BatchResult

NOISE_SPREAD = 0.25  # of the median, from p10 to p90
NOISE_DRIFT = 0.15  # of the ceilings, from before to after
SLOWED_SHARE = 0.6  # of the best product that those in the rounds must reach at their median
NOISE_WORK = 0.1  # of all cores, by other processes


def doubts(
    environment: Environment,
    other_cores: float | None,
    ceilings: Ceilings | None,
    batches: tuple[BatchResult, ...],
) -> Iterator[str]:
    """Yield what makes the numbers doubtful."""
    yield from busy(other_cores, environment.logical_cores)
    if ceilings is not None and ceilings.drift > NOISE_DRIFT:
        yield (
            f"the machine's speed changed by {100 * ceilings.drift:.0f} % during the benchmark; "
            "fractions of the roof are not reliable"
        )
    for batch in batches:
        if ceilings is not None and (products := batch.times(GEMM)):
            best = 1e3 * product_gflop(ceilings.gemm_side) / ceilings.gemm_peak_gflops
            if (share := best / statistics.median(products)) < SLOWED_SHARE:
                yield (
                    f"batch {batch.batch}: the large product of every round ran at "
                    f"{100 * share:.0f} % of the machine's best speed: its clock fell, or others "
                    "work on it; run again on an idle machine"
                )
        for name, times in (
            ("the engines", batch.end_to_end.contender),
            ("the baseline", batch.end_to_end.baseline),
        ):
            if times is not None and times.spread > NOISE_SPREAD:
                yield (
                    f"batch {batch.batch}: the times of {name} spread by "
                    f"{100 * times.spread:.0f} % from p10 to p90; run again on an idle machine"
                )


def busy(other_cores: float | None, cores: int) -> Iterator[str]:
    """Yield the doubt about a machine on which others work."""
    if other_cores is not None and other_cores > NOISE_WORK * cores:
        yield (
            f"other processes kept {other_cores:.1f} of {cores} cores busy: times and even ratios "
            "are not reliable, because threads wait for each other; run again on an idle machine"
        )
