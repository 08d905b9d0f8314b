import math
from typing import Any

import pytest

from nsp.benchmarks.ceilings.cpu import Ceilings
from nsp.benchmarks.contest.rounds import Contestant, Observation
from nsp.benchmarks.contest.subject import Subject
from nsp.benchmarks.flops import TextEncoderSize
from nsp.benchmarks.record.result import CallCost, Cost, batch_result, call_costs

CEILINGS = Ceilings(threads=1, gemm_side=8, gemm_gflops={"numpy": (50.0, 100.0)}, copy_gb_s=(10.0,))
COSTS = [
    CallCost("step", Cost(gflop=1.0, mib=10.0)),
    CallCost("select", Cost(gflop=0.0, mib=1.0)),
    CallCost("step", Cost(gflop=2.0, mib=20.0)),
    CallCost("select", Cost(gflop=0.0, mib=1.0)),
]


def observation(contestant: str, number: int, *, factor: float = 1.0) -> Observation:
    return Observation(
        contestant=contestant,
        round=number,
        place=0,
        wall_ms=100 * factor,
        stage_ms={"step": (30 * factor, 50 * factor), "select": (1 * factor, 4 * factor)},
    )


def result(costs: list[CallCost] = COSTS, *, baseline: str | None = "torch") -> Any:
    observations = [observation("engines", -1, factor=99)]
    observations += [observation("engines", number) for number in range(3)]
    if baseline:
        observations += [observation("torch", number, factor=2) for number in range(3)]
    return batch_result(
        observations,
        costs,
        batch=4,
        candidate="engines",
        baseline=baseline,
        scale_names=["1x1", "2x2"],
    )


def test_rows_add_up_to_the_whole_and_warm_up_is_left_out() -> None:
    found = result()
    assert found.rounds == 3
    assert [(row.name, row.calls) for row in found.rows] == [
        ("step", 2),
        ("select", 2),
        ("outside stages", 1),
        ("end to end", 1),
    ]
    assert [row.candidate.p50 for row in found.rows] == [80, 5, 15, 100]
    assert all(row.speedup == 2 for row in found.rows)
    assert found.images_per_s == 40
    assert found.baseline_images_per_s == 20
    assert len(found.observations) == 7


def test_scale_rows_hold_one_step_each() -> None:
    found = result().scale_rows
    assert [(row.name, row.candidate.p50, row.cost.gflop) for row in found] == [
        ("1x1", 30, 1.0),
        ("2x2", 50, 2.0),
    ]


def test_the_roof_is_the_work_at_the_measured_peak() -> None:
    step, select, outside, whole = result().rows
    assert step.cost == Cost(gflop=3.0, mib=30.0)
    assert step.cost.roof_ms(CEILINGS) == pytest.approx(30)  # 3 GFLOP at 100 GFLOP/s
    assert step.of_roof(CEILINGS) == pytest.approx(30 / 80)
    assert step.cost.memory_ms(CEILINGS) == pytest.approx(30 * 2**20 / 1e7)
    assert whole.cost.gflop == 3.0
    assert select.of_roof(CEILINGS) is None
    assert outside.cost is None
    assert step.of_roof(None) is None


def test_work_that_is_not_counted_leaves_no_ceiling_for_the_whole() -> None:
    found = result([CallCost("text_encoder", None), *COSTS])
    assert found.rows[0].cost is None
    assert found.end_to_end.cost is None


def test_without_a_baseline_rows_stand_alone() -> None:
    found = result(baseline=None)
    assert all(row.baseline is None and row.speedup is None for row in found.rows)
    assert found.baseline_images_per_s is None


def test_bytes_of_a_call_are_its_tensors_and_weights(subject: Subject) -> None:
    pipeline = subject.candidate.pipeline
    config = pipeline.config
    calls = Contestant("a", pipeline).stage_calls(subject.conditions(1))
    costs = call_costs(
        calls,
        pipeline.backend.stages_io,
        family="var",
        config=config,
        weight_dtype="float16",
        text_encoder=TextEncoderSize(1, 64),
    )
    assert [cost.stage for cost in costs] == [call.stage for call in calls]
    decoder = costs[-1].cost
    assert decoder is not None
    pixels, cells = 3 * config.image_size_px**2, 8 * config.latent_side**2
    weights = sum(p.numel() for p in pipeline.backend._stages["decoder"].parameters())
    # Norms are parameters too, but not counted as weights of products.
    assert decoder.mib * 2**20 == pytest.approx(4 * (pixels + cells) + 2 * weights, rel=0.03)
    assert all(cost.cost is not None and math.isfinite(cost.cost.mib) for cost in costs)
