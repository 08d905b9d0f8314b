"""Parts of the time come from the steps of any loop, and parity from what it draws."""

import itertools

import pytest

from nsp.benchmarks.contest.parity import compare
from nsp.benchmarks.contest.rounds import Runner
from nsp.benchmarks.contest.steps import MAX_PARTS, group_steps, parts
from nsp.benchmarks.record.parity import Parity
from nsp.benchmarks.record.result import Cost
from nsp.family.registry import family
from nsp.pipeline.pipeline import Pipeline, torch_pipeline


@pytest.fixture(scope="module")
def latents() -> Pipeline:
    """A model that draws no tokens."""
    record = family("next_scale")
    system = record.learner.untrained(record.sizes["tiny"])
    return torch_pipeline(record, system.eval(), device="cpu")


def names(units: list[tuple[str, bool]], grids: list[tuple[int, int]]) -> list[str]:
    return [group.name for group in group_steps(units, grids)]  # type: ignore[arg-type]


def test_scales_are_named_after_their_grids_and_tokens_are_joined_to_what_can_be_shown() -> None:
    assert names([("scale", True)] * 3, [(1, 1), (2, 2), (4, 4)]) == ["1x1", "2x2", "4x4"]
    assert names([("scale", True)] * 2, [(1, 1), (2, 2), (4, 4)]) == ["scale 1", "scale 2"]
    pixels = [("tokens", number % 4 == 3) for number in range(8)]
    assert names(pixels, [(4, 4)]) == ["tokens 1 to 4", "tokens 5 to 8"]
    assert names([("timestep", False)] * 9 + [("timestep", True)], []) == ["timesteps 1 to 10"]


def test_more_parts_than_one_reads_are_joined() -> None:
    groups = group_steps([("timestep", True)] * 1000, [])
    assert len(groups) <= MAX_PARTS
    assert (groups[0].start, groups[-1].stop) == (0, 1000)
    assert all(a.stop == b.start for a, b in itertools.pairwise(groups))


def test_every_call_is_in_one_part_in_order(latents: Pipeline) -> None:
    played = Runner("a", latents).play({"prompts": ["red apple"], "seed": 1})
    found = list(parts(played, lambda stage, sizes: Cost(gflop=1.0, mib=2.0)))
    assert [part.unit for part in found] == [None, "scale", "scale", "scale", None]
    assert [part.name for part in found[1:-1]] == ["2x2", "4x4", "8x8"]
    counted: dict[str, int] = {}
    for part in found:
        for stage, (start, stop) in part.calls.items():
            assert start == counted.get(stage, 0)
            counted[stage] = stop
    assert sum(counted.values()) == len(played.calls)
    assert sum(cost.gflop for part in found for cost in part.costs.values()) == len(played.calls)


def test_a_model_without_tokens_has_its_latents_compared(latents: Pipeline) -> None:
    request = {"prompts": ["red apple", "two-hump camel"], "seed": 1}
    same = compare(latents, latents, [request], conditions=["red apple", "two-hump camel"])
    assert [step.name for step in same.steps] == ["2x2", "4x4", "8x8"]
    assert not same.has_tokens
    assert not same.forced
    assert (same.token_agreement, same.max_relative_error, same.free_psnr_db) == (None, 0, None)
    assert Parity.from_dict(same.to_dict()) == same
    other = torch_pipeline(
        latents.family, latents.family.learner.untrained(latents.config).eval(), device="cpu"
    )
    assert compare(latents, other, [request]).max_relative_error > 0.01
