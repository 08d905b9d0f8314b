from typing import Any

import pytest

from nsp.benchmarks.ceilings.rates import Ceilings
from nsp.benchmarks.contest.rounds import Runner
from nsp.benchmarks.contest.subject import Subject
from nsp.benchmarks.costs import counter
from nsp.benchmarks.record.result import Cost, Part
from nsp.benchmarks.record.rows import batch_result
from nsp.benchmarks.record.times import Observation

CEILINGS = Ceilings(threads=1, gemm_side=8, gemm_gflops={"numpy": (50.0, 100.0)}, copy_gb_s=(10.0,))


def part(number: int, gflop: float) -> Part:
    return Part(
        name=f"{number + 1}x{number + 1}",
        unit="scale",
        calls={"step": (number, number + 1), "select": (number, number + 1)},
        costs={"step": Cost(gflop=gflop, mib=10 * gflop), "select": Cost(gflop=0.0, mib=1.0)},
    )


PARTS = [part(0, 1.0), part(1, 2.0)]


def observation(contender: str, number: int, *, factor: float = 1.0) -> Observation:
    return Observation(
        contender=contender,
        round=number,
        place=0,
        wall_ms=100 * factor,
        stage_ms={"step": (30 * factor, 50 * factor), "select": (1 * factor, 4 * factor)},
    )


def result(parts: list[Part] = PARTS, *, baseline: str | None = "torch") -> Any:
    observations = [observation("engines", -1, factor=99)]
    observations += [observation("engines", number) for number in range(3)]
    if baseline:
        observations += [observation("torch", number, factor=2) for number in range(3)]
    return batch_result(
        observations,
        parts,
        batch=4,
        contender="engines",
        baseline=baseline,
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
    assert [row.contender.p50 for row in found.rows] == [80, 5, 15, 100]
    assert all(row.speedup == 2 for row in found.rows)
    assert found.images_per_s == 40
    assert found.baseline_images_per_s == 20
    assert len(found.observations) == 7


def test_rows_of_steps_hold_all_stages_of_a_step_and_add_up_to_the_loop() -> None:
    found = result()
    assert [(row.name, row.contender.p50, row.cost.gflop) for row in found.step_rows] == [
        ("1x1", 31, 1.0),
        ("2x2", 54, 2.0),
    ]
    assert (found.loop.contender.p50, found.loop.cost.gflop, found.loop.speedup) == (85, 3.0, 2)


def test_where_calls_cannot_be_told_apart_the_loop_stands_for_the_stages() -> None:
    observed = [
        Observation(contender="a", round=n, place=0, wall_ms=10.0, stage_ms={}, loop_ms=8.0)
        for n in range(3)
    ]
    found = batch_result(observed, PARTS, batch=1, contender="a", baseline=None)
    assert [(row.name, row.contender.p50) for row in found.rows] == [
        ("all steps", 8),
        ("outside stages", 2),
        ("end to end", 10),
    ]
    assert found.step_rows == ()
    assert found.end_to_end.cost == Cost(gflop=3.0, mib=32.0)


def test_the_floor_is_the_longer_of_work_and_bytes_and_the_launches() -> None:
    gpu = Ceilings(
        threads=1,
        gemm_side=8,
        gemm_gflops={"torch": (1000.0,)},
        copy_gb_s=(10.0,),
        launch_us=5.0,
        graph_kernel_us=2.0,
    )
    bytes_ms = (10 + 20 + 1 + 1) * 2**20 / 1e7  # longer than 1 and 2 GFLOP at 1000 GFLOP/s
    assert result().floor_ms(gpu, 4) == pytest.approx(bytes_ms + 2 * 4 * 7 * 0.002)


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
    unknown = Part(name="text", unit=None, calls={"text": (0, 1)}, costs={})
    found = result([unknown, *PARTS])
    assert found.rows[0].cost is None
    assert found.end_to_end.cost is None
    assert found.loop.cost is not None


def test_without_a_baseline_rows_stand_alone() -> None:
    found = result(baseline=None)
    assert all(row.baseline is None and row.speedup is None for row in found.rows)
    assert found.baseline_images_per_s is None


def test_bytes_of_a_call_are_its_tensors_and_weights(subject: Subject) -> None:
    pipeline = subject.contender.pipeline
    config = pipeline.config
    calls = Runner("a", pipeline).play(subject.request(1, 0)).calls
    count = counter(subject.costs, pipeline)
    costs = [count(call.stage, call.sizes) for call in calls]
    assert all(cost is not None for cost in costs)
    decoder = costs[-1]
    pixels, cells = 3 * config.image_size_px**2, 8 * config.latent_side**2
    weights = sum(p.numel() for p in pipeline.backend._stages["decoder"].parameters())
    assert decoder.mib * 2**20 == pytest.approx(4 * (pixels + cells + weights), rel=0.03)
