"""What generating costs, as it was counted at export: what speeds and memory are compared with.

All that the benchmark knows of counted work goes through here.
"""

from collections.abc import Iterable, Mapping

from nsp.artifacts.costs import StageCosts, arena_bytes, call_cost
from nsp.benchmarks.contest.clocked import StageCall
from nsp.benchmarks.contest.steps import Count
from nsp.benchmarks.record.result import Cost, Footprint
from nsp.pipeline.pipeline import Pipeline
from nsp.stage.arena import is_cached
from nsp.stage.io import Sizes, StageIO, array_bytes

Costs = Mapping[str, StageCosts]


def counter(costs: Costs, pipeline: Pipeline) -> Count:
    """Return what gives the cost of one call of a stage; None for work that was not counted."""

    def cost(stage: str, sizes: Sizes) -> Cost | None:
        io = pipeline.backend.stages_io[stage]
        known = costs.get(stage)
        found = None if known is None else call_cost(known, io, sizes, pipeline.precision)
        if found is None:
            return None
        return Cost(gflop=1e-9 * found.flop, mib=found.num_bytes / 2**20)

    return cost


def footprint(
    costs: Costs, pipeline: Pipeline, calls: Iterable[StageCall], *, weights_mib: float
) -> Footprint | None:
    """Return the memory that the `calls` of one image must take; None where it was not counted.

    Weights as their files are, the cache as the backend lays it out, and scratch: the widest moment
    of each stage and its outputs. Stages add up, as each session keeps what it once took.
    """
    calls = [*calls]
    if any(call.stage not in costs for call in calls):
        return None
    scratch: dict[str, int] = {}
    for call in calls:
        outputs = _output_bytes(pipeline.backend.stages_io[call.stage], call.sizes)
        taken = costs[call.stage].scratch + outputs
        scratch[call.stage] = max(scratch.get(call.stage, 0), taken)
    rows = max(call.sizes.get("G", 1) for call in calls)
    backend = pipeline.backend
    cache = pipeline.family.cache(pipeline.config, rows, backend.kv_dtype())
    arena = 0 if cache is None else arena_bytes(backend.kv_layout, cache)
    return Footprint(
        weights_mib=weights_mib,
        arena_mib=arena / 2**20,
        scratch_mib=sum(scratch.values()) / 2**20,
    )


def _output_bytes(io: StageIO, sizes: Sizes) -> int:
    """Return the bytes of all outputs that are not keys and values, which the arena holds."""
    specs = [spec for name, spec in io.outputs.items() if not is_cached(name)]
    return sum(array_bytes(spec.shape(sizes), spec.dtype) for spec in specs)
