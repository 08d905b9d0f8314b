"""What sampling settings and random numbers promise: the reference's ramp, and numbers of an
image's own."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsp.errors import ConfigError
from nsp.families.var.sampling import VarSampling, draw_gumbel, scale_ratios
from nsp.family.code_sampling import draw_uniforms, rank_bucket
from nsp.stage.backend import TENSORRT_RANKS


@given(st.integers(0, 2**63), st.integers(1, 40), st.integers(0, 9))
def test_the_first_numbers_of_an_image_do_not_depend_on_how_many_it_has(
    seed: int, num_tokens: int, more: int
) -> None:
    drawn = draw_uniforms(seed, num_tokens)
    np.testing.assert_array_equal(drawn, draw_uniforms(seed, num_tokens + more)[:num_tokens])
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1


@pytest.mark.parametrize("seed", [-1, 2**64, None, 1.5, True, "3"])
def test_a_seed_out_of_range_is_refused(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed"):
        draw_uniforms(seed, 4)


def test_seeds_have_numbers_of_their_own() -> None:
    assert len({draw_uniforms(seed, 64).tobytes() for seed in range(9)}) == 9


def test_uniform_numbers_stay_what_they_were() -> None:
    # A change here changes every image anyone has made with a seed.
    expected = [0.03474188, 0.01154673, 0.61195022, 0.24154919]
    np.testing.assert_allclose(draw_uniforms(0, 4), expected, rtol=1e-6)


def test_gumbel_noise_is_finite_and_apart_from_the_uniforms() -> None:
    noise = draw_gumbel(3, 60, 500)
    assert noise.shape == (60, 500)
    assert noise.dtype == np.float32
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.03  # mean of the standard Gumbel distribution
    assert abs(noise.std() - np.pi / np.sqrt(6)) < 0.03
    uniforms = draw_uniforms(3, 10_000)
    assert not np.isin(np.exp(-np.exp(-noise[:20].ravel())), uniforms).all()


@given(st.floats(0, 20), st.integers(2, 14))
def test_the_ramp_is_the_published_one(guidance_scale: float, num_scales: int) -> None:
    # VAR: t = cfg * ratio; logits = (1 + t) * cond - t * uncond, with cfg = guidance_scale - 1.
    found = VarSampling(guidance_scale=guidance_scale).guidance_per_scale(num_scales)
    ratios = [scale / (num_scales - 1) for scale in range(num_scales)]
    assert found == pytest.approx([1 + (guidance_scale - 1) * ratio for ratio in ratios])
    assert found[0] == 1


def test_constant_and_interval_schedules() -> None:
    constant = VarSampling(guidance_scale=3.0, guidance_schedule="constant")
    assert constant.guidance_per_scale(4) == [3.0] * 4
    interval = VarSampling(
        guidance_scale=3.0, guidance_schedule="interval", guidance_interval=(0.3, 0.7)
    )
    assert interval.guidance_per_scale(4) == [1.0, 3.0, 3.0, 1.0]


def test_a_single_scale_has_ratio_0() -> None:
    assert scale_ratios(1) == [0.0]
    assert VarSampling(guidance_scale=4.0).guidance_per_scale(1) == [1.0]


def test_as_few_logits_are_sorted_as_the_filters_allow_in_few_different_numbers() -> None:
    assert VarSampling().num_ranks(4096) == 1
    assert VarSampling(top_p=0.9).num_ranks(4096) == 4096
    both = VarSampling(top_k=900, top_p=0.96)
    assert (both.num_ranks(4096), both.num_ranks(64)) == (1024, 64)
    assert VarSampling(top_k=1).num_ranks(4096) == 1


@given(st.integers(0, 10_000), st.sampled_from([1, 5, 64, 4000, 4096, 16_384]))
def test_a_bucket_holds_every_rank_and_what_tensorrt_can_sort_stays_so(
    top_k: int, vocab_size: int
) -> None:
    needed = min(max(top_k, 1), vocab_size)
    bucket = rank_bucket(top_k, vocab_size)
    assert needed <= bucket <= min(max(2 * needed - 1, 1), vocab_size)
    assert (bucket <= TENSORRT_RANKS) == (needed <= TENSORRT_RANKS)


@pytest.mark.parametrize(
    "values",
    [
        {"guidance_scale": -1.0},
        {"guidance_scale": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"guidance_interval": (0.0,)},
        {"guidance_interval": (0.2, 0.8)},  # the ramp has none
        {"guidance_scale": 1e300},
        {"temperature": 1e-300},
        {"top_p": 1e-300},
        {"guidance_schedule": "cosine"},
        {"top_q": 1},
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        VarSampling.from_dict(values)


def test_changing_settings_keeps_the_others_and_drops_an_interval_without_use() -> None:
    own = VarSampling(
        guidance_schedule="interval", guidance_interval=(0.2, 0.8), guidance_scale=3.0
    )
    assert own.changed({}) == own
    assert own.changed({"guidance_interval": [0.1, 0.5]}).guidance_interval == (0.1, 0.5)
    ramp = own.changed({"guidance_schedule": "ramp"})
    assert ramp == VarSampling(guidance_scale=3.0)
    assert own.changed(ramp.to_dict()) == ramp
    with pytest.raises(ConfigError, match="has no effect"):
        own.changed({"guidance_schedule": "ramp", "guidance_interval": (0.2, 0.8)})


@given(st.floats(0, 30), st.sampled_from(["ramp", "constant", "interval"]), st.integers(0, 5000))
def test_settings_survive_the_manifest(scale: float, schedule: str, top_k: int) -> None:
    values = {"guidance_scale": scale, "guidance_schedule": schedule, "top_k": top_k}
    settings = VarSampling.from_dict(values)
    assert VarSampling.from_dict(settings.to_dict()) == settings
