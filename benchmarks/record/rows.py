"""The rows of a batch size, computed from raw observations and counted work."""

from collections.abc import Callable, Sequence
from functools import partial

from nsp.benchmarks.record.result import (
    END_TO_END,
    LOOP,
    OUTSIDE,
    BatchResult,
    Cost,
    Part,
    Row,
    Stopped,
    loop_ms,
    total,
)
from nsp.benchmarks.record.times import Observation, percentiles, whole

Of = Callable[[Observation], float]


def batch_result(
    observations: Sequence[Observation],
    parts: Sequence[Part],
    *,
    batch: int,
    contender: str,
    baseline: str | None,
    stopped: Stopped = "rounds",
) -> BatchResult:
    """Return the rows of one batch size; observations of warm-up rounds are only kept.

    If the contender's calls of stages are unknown, its loop takes the place of the stages.
    """
    measured = [each for each in observations if not each.warmup]
    ours = [each for each in measured if each.contender == contender]
    theirs = [each for each in measured if each.contender == baseline]
    parts = tuple(parts)

    def row(name: str, of: Of, calls: int, cost: Cost | None) -> Row:
        return Row(
            name=name,
            calls=calls,
            contender=percentiles([of(each) for each in ours]),
            baseline=percentiles([of(each) for each in theirs]) if theirs else None,
            cost=cost,
        )

    steps = [part for part in parts if part.unit]
    all_steps = partial(loop_ms, parts)
    loop = None
    if steps:
        loop = row(LOOP, all_steps, len(steps), total(part.cost for part in steps))
    recorded = any(each.loop_ms is not None for each in ours)
    rows, step_rows = [], []
    if recorded:
        assert loop is not None
        rows += [loop, row(OUTSIDE, lambda o: o.wall_ms - all_steps(o), 1, None)]
    else:
        for stage in dict.fromkeys(stage for part in parts for stage in part.calls):
            mine = [part for part in parts if stage in part.calls]
            calls = sum(stop - start for start, stop in (part.calls[stage] for part in mine))
            cost = total(part.costs.get(stage) for part in mine)
            rows.append(row(stage, partial(_stage_ms, stage), calls, cost))
        rows.append(row(OUTSIDE, lambda o: o.outside_ms, 1, None))
        if len(steps) > 1:
            step_rows = [row(part.name, part.ms, 1, part.cost) for part in steps]
    rows.append(row(END_TO_END, whole, 1, total(part.cost for part in parts)))
    return BatchResult(
        batch=batch,
        rounds=len(ours),
        rows=tuple(rows),
        parts=parts,
        step_rows=tuple(step_rows),
        loop=loop,
        observations=tuple(observations),
        stopped=stopped,
    )


def _stage_ms(stage: str, observation: Observation) -> float:
    return observation.stage_total_ms(stage)
