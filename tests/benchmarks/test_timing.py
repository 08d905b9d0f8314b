from typing import Any

import numpy as np
import pytest

from nsp.benchmarks.contest.rounds import Runner, Stability, interleaved
from nsp.benchmarks.record.times import Observation, percentiles
from nsp.pipeline.pipeline import Pipeline

REQUEST = {"prompts": ["red apple"], "seed": 3}


def test_percentiles_are_those_of_the_sorted_values() -> None:
    found = percentiles([float(value) for value in reversed(range(1, 102))])
    assert (found.count, found.min, found.max) == (101, 1, 101)
    assert (found.p10, found.p50, found.p90, found.p99) == (11, 51, 91, 100)
    assert found.spread == pytest.approx(80 / 51)


def test_percentiles_of_one_value_are_that_value() -> None:
    found = percentiles([2.5])
    assert {found.min, found.p10, found.p50, found.p90, found.p99, found.max} == {2.5}
    assert found.spread == 0


def test_contenders_take_turns_and_the_first_to_run_changes_every_round(
    reference: Pipeline,
) -> None:
    contenders = [Runner("a", reference), Runner("b", reference)]
    seen = list(interleaved(contenders, REQUEST, rounds=2, warmup=2, pause_s=0))
    assert [(each.round, each.place, each.contender) for each in seen] == [
        (-2, 0, "a"),
        (-2, 1, "b"),
        (-1, 0, "b"),
        (-1, 1, "a"),
        (0, 0, "a"),
        (0, 1, "b"),
        (1, 0, "b"),
        (1, 1, "a"),
    ]
    assert [each.warmup for each in seen] == [True] * 4 + [False] * 4


def test_no_round_starts_after_the_time_is_up_but_the_least_number_is_measured(
    reference: Pipeline,
) -> None:
    contenders = [Runner("a", reference)]
    seen = interleaved(
        contenders, REQUEST, rounds=9, warmup=1, min_rounds=2, max_seconds=0, pause_s=0
    )
    assert [each.round for each in seen] == [-1, 0, 1]


def test_every_stage_call_is_timed_and_lies_within_the_whole(reference: Pipeline) -> None:
    observation = Runner("a", reference).observe(REQUEST, number=0, place=0)
    num_scales = reference.config.num_scales
    assert {stage: len(calls) for stage, calls in observation.stage_ms.items()} == {
        "text_encoder": 1,
        "condition": 1,
        "step": num_scales,
        "select": num_scales,
        "accumulate": num_scales,
        "decoder": 1,
    }
    assert 0 < observation.outside_ms < observation.wall_ms


def test_the_clock_does_not_change_images_and_the_pipeline_is_left_as_it_was(
    reference: Pipeline,
) -> None:
    backend = reference.backend
    contender = Runner("a", reference)
    assert reference.backend is backend
    timed = contender._watched.generate(**REQUEST)
    assert np.array_equal(timed.images, reference.generate(**REQUEST).images)


def test_stage_calls_tell_the_sizes_of_every_scale(reference: Pipeline) -> None:
    calls = Runner("a", reference).play(REQUEST).calls
    lengths = [side**2 for side in reference.config.patch_nums]
    steps = [call.sizes for call in calls if call.stage == "step"]
    assert [sizes["L"] for sizes in steps] == lengths
    assert [sizes["P"] for sizes in steps] == [sum(lengths[:i]) for i in range(len(lengths))]
    assert {sizes["G"] for sizes in steps} == {2}  # guidance is on


def walls(contender: str, values: list[float]) -> list[Observation]:
    return [
        Observation(contender=contender, round=n, place=0, wall_ms=value, stage_ms={})
        for n, value in enumerate(values)
    ]


def test_a_measurement_is_stable_when_no_median_moved_over_the_window() -> None:
    stability = Stability(window=3, tolerance=0.02)
    steady = walls("a", [10, 11, 9, 10, 11, 9])
    assert stability.reached(steady)
    assert not stability.reached(steady[:5])  # two windows are needed
    assert not stability.reached([*steady, *walls("b", [10, 10, 10, 14, 14, 14])])
    assert stability.reached([*steady, *walls("b", [10, 10, 10, 10.1, 10.1, 10.1])])
    warm_up = Observation(contender="a", round=-1, place=0, wall_ms=999, stage_ms={})
    assert stability.reached([warm_up, *steady])
    assert not stability.reached([warm_up])


class Clock:
    """A contender that takes the times it is given, over and over."""

    def __init__(self, name: str, values: list[float]) -> None:
        self.name, self.values = name, values

    def observe(self, request: Any, *, number: int, place: int) -> Observation:
        return Observation(
            contender=self.name,
            round=number,
            place=place,
            wall_ms=self.values[number % len(self.values)],
            stage_ms={},
        )


def test_rounds_end_with_stability_and_never_go_past_the_most() -> None:
    stability = Stability(window=4, tolerance=0.01)

    def rounds(values: list[float]) -> int:
        contenders = [Clock("a", [5.0]), Clock("b", values)]
        seen = interleaved(contenders, {}, rounds=40, warmup=1, stability=stability, pause_s=0)
        return sum(not each.warmup for each in seen) // 2

    assert rounds([7.0]) == 8
    assert rounds([float(2**n) for n in range(40)]) == 40
