"""What a step sees depends on the seed and the step alone, not on devices or micro-batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsp.errors import ConfigError
from nsp.training.data_order import Share, StepSampler, sample_keys, sample_uniforms


def test_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=5 exceeds the 4"):
        StepSampler(4, Share(batch_size=5), start=0, stop=10, seed=0)


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=6 .* 2 processes x 2 .*multiple of 4"):
        Share(batch_size=6, world_size=2, accumulate=2)


def test_steps_from_the_middle_see_what_they_would_have_seen() -> None:
    share = Share(batch_size=3)
    whole = list(StepSampler(10, share, start=0, stop=12, seed=1))
    assert list(StepSampler(10, share, start=5, stop=12, seed=1)) == whole[5:]
    first_epoch = [index for batch in whole[:3] for _, index in batch]
    assert len(set(first_epoch)) == 9


@given(world=st.integers(1, 4), accumulate=st.integers(1, 3), part=st.integers(1, 3))
def test_processes_and_micro_batches_share_the_batch_of_one_process(
    world: int, accumulate: int, part: int
) -> None:
    size = world * accumulate * part
    whole = list(StepSampler(40, Share(batch_size=size), start=2, stop=5, seed=1))
    keys = [sample_keys(Share(batch_size=size), step, 0, seed=7) for step in range(2, 5)]
    shares = [
        Share(batch_size=size, rank=r, world_size=world, accumulate=accumulate)
        for r in range(world)
    ]
    parts = [list(StepSampler(40, share, start=2, stop=5, seed=1)) for share in shares]
    for i in range(3):
        cut = [batches[i * accumulate : (i + 1) * accumulate] for batches in parts]
        assert [pair for mine in cut for micro in mine for pair in micro] == whole[i]
        of_parts = [
            sample_keys(share, 2 + i, m, seed=7) for share in shares for m in range(accumulate)
        ]
        assert torch.equal(torch.cat(of_parts), keys[i])


def test_uniforms_belong_to_the_key() -> None:
    keys = torch.tensor([5, 1 << 62, 7])
    drawn = sample_uniforms(keys, 4)
    assert torch.equal(sample_uniforms(keys[1:], 4), drawn[1:])
    assert len(drawn.unique()) == 12
    assert 0 <= drawn.min() < drawn.max() < 1
