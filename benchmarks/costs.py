"""What generating costs, as it was counted: operations, bytes and memory that speeds are held to.

All that the benchmark knows of counted work goes through here.
"""

from collections.abc import Mapping
from pathlib import Path

from nsp.benchmarks.contest.clocked import StageCall
from nsp.benchmarks.contest.steps import Count
from nsp.benchmarks.flops import TextEncoderSize, stage_work
from nsp.benchmarks.footprint import FOOTPRINTS
from nsp.benchmarks.record.result import Cost, Footprint
from nsp.pipeline.pipeline import Pipeline
from nsp.stage.io import Sizes, StageIO

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1}


def counter(pipeline: Pipeline, checkpoint: Path | None) -> Count:
    """Return what gives the cost of one call of a stage; None where nothing counted it."""
    text_encoder = None if checkpoint is None else TextEncoderSize.read(checkpoint)
    family, config = pipeline.family.name, pipeline.config
    stages_io: Mapping[str, StageIO] = pipeline.backend.stages_io
    weight_bytes = _DTYPE_BYTES[pipeline.backend.kv_dtype()]

    def cost(stage: str, sizes: Sizes) -> Cost | None:
        work = stage_work(family, config, stage, sizes, text_encoder)
        if work is None:
            return None
        moved = work.weights * weight_bytes + _tensor_bytes(stages_io[stage], sizes)
        return Cost(gflop=1e-9 * work.flops, mib=moved / 2**20)

    return cost


def _tensor_bytes(io: StageIO, sizes: Sizes) -> int:
    """Return the bytes of all inputs and outputs of a call."""
    total = 0
    for spec in (*io.inputs.values(), *io.outputs.values()):
        count = _DTYPE_BYTES[spec.dtype]
        for size in spec.shape(sizes):
            count *= size
        total += count
    return total


def footprint(
    pipeline: Pipeline, calls: list[StageCall], *, weights_mib: float
) -> Footprint | None:
    """Return the memory that the `calls` of one image must take; None where nothing counts it."""
    record = pipeline.family
    if record.name not in FOOTPRINTS:
        return None
    rows = max(call.sizes.get("G", 0) for call in calls)
    return FOOTPRINTS[record.name](
        pipeline.config,
        calls,
        weights_mib=weights_mib,
        kv_layout=pipeline.backend.kv_layout,
        kv_shape=record.cache(pipeline.config, rows, pipeline.backend.kv_dtype()),
    )
