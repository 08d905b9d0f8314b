"""What the generator promises: residuals over bilinear, a cache that changes nothing, kept dtypes.

The defects named are those of the first implementation of the idea.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nsp.families.next_scale.model import AdaLayerNorm, GroupedAttention, grow, resize
from nsp.families.next_scale.system import NextScaleSystem
from nsp.layers.attention import KeyValue
from nsp.layers.resample import bilinear_matrix
from nsp.pipeline.pipeline import Pipeline, torch_pipeline
from tests.families.next_scale.models import new_tiny_system, tiny_config

LIMIT = 2e-5  # float32, sums in another order


@pytest.fixture(scope="module")
def system() -> NextScaleSystem:
    return new_tiny_system()


@pytest.fixture(scope="module")
def pipe(system: NextScaleSystem) -> Pipeline:
    from nsp.family.registry import family

    return torch_pipeline(family("next_scale"), system, device="cpu")


def _first(system: NextScaleSystem, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Return a first latent and conditions."""
    config = system.config
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.vae.latent_channels, config.initial_size, config.initial_size)
    latent = torch.randn(shape, generator=generator)
    return latent, torch.randn(batch, config.generator.condition_width, generator=generator)


def test_bilinear_matrices_are_torchs_interpolation() -> None:
    for size_in, size_out in ((1, 4), (2, 4), (4, 12), (16, 32)):
        x = torch.randn(1, 2, size_in, size_in)
        expected = F.interpolate(x, (size_out, size_out), mode="bilinear", align_corners=False)
        found = resize(x, torch.tensor(np.array(bilinear_matrix(size_in, size_out))))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_an_untrained_model_is_exact_bilinear_upscaling() -> None:
    system = new_tiny_system(trained=False)
    latent, condition = _first(system)
    for grown in system.generator(latent, condition)[1:]:
        latent = F.interpolate(latent, scale_factor=2, mode="bilinear", align_corners=False)
        torch.testing.assert_close(grown, latent, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("attn_max_size", [2, 64])
def test_stages_with_a_cache_give_what_the_whole_chain_gives(attn_max_size: int) -> None:
    from nsp.family.registry import family

    system = new_tiny_system(tiny_config(attn_max_size=attn_max_size))
    pipeline = torch_pipeline(family("next_scale"), system, device="cpu")
    result = pipeline.generate(prompts=["red apple", "green apple"], seed=5, trace=True)
    assert result.trace is not None
    first = torch.from_numpy(result.trace.latents[0])
    condition = system.condition(
        system.encode_prompts(["red apple", "green apple"]), torch.zeros(2, dtype=torch.bool)
    )
    for cached, whole in zip(result.trace.latents, system.generator(first, condition), strict=True):
        torch.testing.assert_close(torch.from_numpy(cached), whole, rtol=LIMIT, atol=LIMIT)


@torch.no_grad()
def test_coarser_latents_reach_finer_ones_through_the_cache(system: NextScaleSystem) -> None:
    predictor, (latent, condition) = system.generator.predictors[0], _first(system)
    _, cache = predictor(latent, condition, [])
    _, other = predictor(latent + 1, condition, [])
    finer = torch.randn(2, 4, 4, 4)
    one, _ = system.generator.predictors[1](finer, condition, cache)
    two, _ = system.generator.predictors[1](finer, condition, other)
    assert (one - two).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("num_kv_groups", [1, 2, 4])
def test_grouped_attention_is_attention_with_repeated_keys(num_kv_groups: int) -> None:
    attention = GroupedAttention(16, 4, num_kv_groups, own_keys=True)
    x, positions = torch.randn(2, 5, 16), torch.randn(5, 16)
    past = (torch.randn(3, 2, num_kv_groups, 4), torch.randn(3, 2, num_kv_groups, 4))
    found, own = attention(x, positions, past)
    assert own is not None
    assert own[0].shape == (5, 2, num_kv_groups, 4)
    k, v = (torch.cat([p, n]).permute(1, 2, 0, 3) for p, n in zip(past, own, strict=True))
    repeat = 4 // num_kv_groups
    q = attention.q(x + positions).unflatten(-1, (4, 4)).transpose(1, 2)
    weights = (q @ k.repeat_interleave(repeat, 1).transpose(-1, -2) / 2).softmax(-1)
    expected = attention.out((weights @ v.repeat_interleave(repeat, 1)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected, rtol=LIMIT, atol=LIMIT)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latents_come_out_in_the_dtype_they_went_in(
    system: NextScaleSystem, dtype: torch.dtype
) -> None:
    latent, condition = _first(system)
    grown = system.generator(latent.to(dtype), condition)
    assert {each.dtype for each in grown} == {dtype}
    assert system.generator.base(latent.to(dtype), condition, torch.zeros(2)).dtype == dtype
    narrow = copy.deepcopy(system.generator).to(dtype)
    assert {each.dtype for each in narrow(latent.to(dtype), condition)} == {dtype}


def test_a_regression_base_makes_the_first_latent_in_one_step() -> None:
    from nsp.family.registry import family

    system = new_tiny_system(tiny_config(base="regression"))
    pipe = torch_pipeline(family("next_scale"), system, device="cpu")
    calls: list[str] = []
    run = pipe.backend.run

    def counted(stage: str, *arguments: Any) -> dict[str, Any]:
        calls.append(stage)
        return run(stage, *arguments)

    pipe.backend.run = counted  # type: ignore[method-assign,assignment]
    images = pipe.generate(prompts=["red apple"], seed=1).images
    assert calls.count("base") == 1
    assert images.shape == (1, 16, 16, 3)


def test_every_scale_is_given_out_and_decodes_at_its_own_size(pipe: Pipeline) -> None:
    sizes = [step.decode().shape[-1] for step in pipe.stream(prompts=["red apple"])]
    assert sizes == [4, 8, 16]


def test_no_prompt_is_the_null_condition_and_prompts_matter(pipe: Pipeline) -> None:
    def latent(prompt: str, scale: float) -> np.ndarray:
        steps = pipe.stream(prompts=[prompt], seed=1, guidance_scale=scale)
        return list(steps)[-1].latent

    assert np.abs(latent("red apple", 1.0) - latent("", 1.0)).max() > 1e-3
    # Guided away from no prompt, no prompt stays where it is.
    np.testing.assert_allclose(latent("", 3.0), latent("", 1.0), rtol=1e-3, atol=1e-4)


# The defects of the first implementation.


def test_a_pixels_brightness_survives_the_norm() -> None:
    """Defect: a norm over three colour channels took away each pixel's brightness."""
    system = new_tiny_system()
    latent, condition = _first(system)
    brighter = system.generator(latent + 3, condition)[-1] - system.generator(latent, condition)[-1]
    assert brighter.abs().mean() > 1  # bilinear alone would carry all of it
    assert AdaLayerNorm(16, 16).linear.out_features == 32  # of feature channels, not of colours


@torch.no_grad()
def test_every_scale_hears_the_prompt(system: NextScaleSystem) -> None:
    """Defect: scales between first and last were trained without their modulation."""
    latent, condition = _first(system)
    past: list[KeyValue] = []
    for predictor in system.generator.predictors:
        following, new = predictor(latent, condition, past)
        other, _ = predictor(latent, condition + 1, past)
        assert (following - other).abs().max() > 1e-3
        latent, past = following, grow(past, new)


def test_half_precision_autocast_computes_in_half(system: NextScaleSystem) -> None:
    """Defect: the half-precision flag autocast to float32."""
    latent, condition = _first(system)
    seen = []
    layer = system.generator.predictors[0].expand
    handle = layer.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        grown = system.generator(latent, condition)
    handle.remove()
    assert seen == [torch.bfloat16]
    assert grown[-1].dtype == torch.float32
