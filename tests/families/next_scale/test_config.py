"""Sizes lead from the initial side to the target by whole factors, or are refused with advice."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsp.errors import ConfigError
from nsp.families.next_scale.config import SIZES, VaeConfig

SDXL, TINY = SIZES["sdxl"], SIZES["tiny"]


def test_sixteen_to_1024_by_two_gives_latents_of_16_32_64_and_128() -> None:
    assert SDXL.sides == (16, 32, 64, 128)
    assert [side * SDXL.vae.downsampling for side in SDXL.sides] == [128, 256, 512, 1024]
    assert SDXL.vae.scaling_factor == 0.13025


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ({"target_size": 1000}, "nearest target_size: 512 or 1024"),
        ({"target_size": 64}, "nearest target_size: 256; nearest initial_size: 4 or 2"),
        ({"target_size": 128}, "nearest initial_size: 8 or 4"),
        ({"initial_size": 24}, "nearest target_size: 768 or 1536; nearest initial_size: 32 or 16"),
        ({"scale_factor": 3}, "nearest target_size: 384 or 1152"),
        ({"scale_factor": 1}, "scale_factor must be an integer of at least 2"),
        ({"initial_size": 0}, "initial_size must be an integer of at least 1"),
    ],
)
def test_sizes_that_do_not_meet_are_refused_naming_the_nearest_that_do(
    sizes: dict[str, int], advice: str
) -> None:
    with pytest.raises(ConfigError, match=advice):
        dataclasses.replace(SDXL, **sizes)


@given(first=st.integers(1, 9), factor=st.integers(2, 4), count=st.integers(1, 5))
def test_the_number_of_scales_is_exact_where_a_logarithm_rounds(
    first: int, factor: int, count: int
) -> None:
    generator = dataclasses.replace(TINY.generator, attn_max_size=16)
    config = dataclasses.replace(
        TINY,
        generator=generator,
        initial_size=first,
        scale_factor=factor,
        target_size=first * factor**count * TINY.vae.downsampling,
    )
    assert config.num_predictors == count
    assert config.sides[-1] == config.latent_side == first * factor**count


def test_a_decoder_is_scaled_by_powers_of_two_only() -> None:
    with pytest.raises(ConfigError, match="power of two"):
        VaeConfig(block_out_channels=(32,), decoder_scale=3)
