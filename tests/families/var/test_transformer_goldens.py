"""The transformer and its loop compute what the public implementation computes.

Tolerances: 1e-4 absolute in float32, as the fixtures' README suggests; tokens are well separated
and must be equal.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.families.var.model import NextScaleTransformer
from nsp.families.var.system import VarSystem
from nsp.family.registry import family
from nsp.layers.attention import KeyValue, attend_delta, attend_present
from nsp.layers.logits import filter_by_rank, sample_by_inverse_cdf
from nsp.pipeline.pipeline import Pipeline, torch_pipeline
from tests.goldens.var_tiny.fixtures import document, part, tensors, variant_config

SCALES = range(4)


@pytest.fixture(scope="module")
def system(tiny_class_checkpoint: Path) -> VarSystem:
    loaded: VarSystem = read_checkpoint(tiny_class_checkpoint).load()
    return loaded


@pytest.fixture(scope="module", params=["delta", "present"])
def pipeline(system: VarSystem, request: pytest.FixtureRequest) -> Pipeline:
    return torch_pipeline(family("var"), system, kv_layout=request.param)


def variant(name: str) -> NextScaleTransformer:
    model = NextScaleTransformer(variant_config(name))
    model.load_state_dict(part(tensors("var_variants"), f"{name}/weights/"))
    return model.eval()


@torch.no_grad()
def test_teacher_forced_logits_match(system: VarSystem) -> None:
    io = tensors("io")
    conditioning = system.predictor.condition_on_class(io["tf/label"])
    logits = system.predictor(conditioning, io["vae/var_input"])
    torch.testing.assert_close(logits, io["tf/logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["plain", "saln"])
@torch.no_grad()
def test_variants_match_teacher_forced_and_step_by_step(name: str) -> None:
    model, values = variant(name), part(tensors("var_variants"), f"{name}/")
    conditioning = model.condition_on_class(values["tf/label"])
    teacher = tensors("io")["vae/var_input"]
    expected = values["tf/logits"]
    torch.testing.assert_close(model(conditioning, teacher), expected, atol=1e-4, rtol=0)
    for attend, shape in ((attend_delta, (0, 2, 2, 16)), (attend_present, (2, 2, 0, 16))):
        past = [(torch.zeros(shape), torch.zeros(shape))] * 2
        start = 0
        for scale, side in enumerate((1, 2, 3, 4)):
            stop = start + side**2
            x = conditioning.x_GLC
            if scale:
                x = model.word_embed(teacher[:, start - 1 : stop - 1])
            positions = torch.arange(start, stop)
            logits, new = model.step(x, positions, conditioning, past, attend)
            torch.testing.assert_close(logits, expected[:, start:stop], atol=1e-4, rtol=0)
            past = _grown(past, new) if attend is attend_delta else new
            start = stop


def _grown(past: list[KeyValue], new: list[KeyValue]) -> list[KeyValue]:
    pairs = zip(past, new, strict=True)
    return [(torch.cat([pk, k]), torch.cat([pv, v])) for (pk, pv), (k, v) in pairs]


def test_greedy_trace_matches_token_for_token(pipeline: Pipeline) -> None:
    io = {k: v.numpy() for k, v in part(tensors("io"), "ar_greedy/").items()}
    result = pipeline.generate(class_ids=io["label"], guidance_scale=2.5, top_k=1, trace=True)
    assert result.trace is not None
    for scale in SCALES:
        assert np.array_equal(result.trace.tokens[scale], io[f"idx/{scale}"])
        expected = io[f"logits_cfg/{scale}"]
        np.testing.assert_allclose(result.trace.logits[scale], expected, atol=1e-4, rtol=0)
        latent = result.trace.latents[scale]
        np.testing.assert_allclose(latent, io[f"f_hat/{scale}"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(result.trace.image, io["img"], atol=1e-4, rtol=0)


def test_keys_and_values_match(system: VarSystem) -> None:
    io = part(tensors("io"), "ar_greedy/")
    pipe = torch_pipeline(family("var"), system)
    arenas = []
    make_arena: Callable = pipe.backend.new_arena
    pipe.backend.new_arena = lambda shape: arenas.append(make_arena(shape)) or arenas[-1]  # type: ignore[method-assign]
    pipe.generate(class_ids=io["label"].tolist(), guidance_scale=2.5, top_k=1)
    past = arenas[0].past()
    for layer in range(4):
        for kind in ("k", "v"):
            actual = past[f"past_{kind}_{layer}"].permute(1, 2, 0, 3)
            expected = io[f"kv/{layer}/{kind}"]
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["plain", "saln"])
def test_variants_generate_the_recorded_tokens(system: VarSystem, name: str) -> None:
    model = VarSystem(variant_config(name))
    model.vae.load_state_dict(system.vae.state_dict())
    model.predictor = variant(name)
    io = {k: v.numpy() for k, v in part(tensors("var_variants"), f"{name}/ar_greedy/").items()}
    result = torch_pipeline(family("var"), model.eval()).generate(
        class_ids=io["label"], guidance_scale=3.0, top_k=1, trace=True
    )
    assert result.trace is not None
    for scale in SCALES:
        assert np.array_equal(result.trace.tokens[scale], io[f"idx/{scale}"])
        expected = io[f"logits_cfg/{scale}"]
        np.testing.assert_allclose(result.trace.logits[scale], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("trace", "top_p"), [("ar_sample", 0.95), ("ar_smooth", 0.9)])
def test_filtered_logits_match(trace: str, top_p: float) -> None:
    io = part(tensors("io"), f"{trace}/")
    for scale in SCALES:
        guided = io[f"logits_cfg/{scale}"]
        settings = torch.full((len(guided),), top_p), torch.full((len(guided),), 14)
        filtered = filter_by_rank(guided, *settings, torch.arange(16))
        assert torch.equal(filtered, io[f"logits_filtered/{scale}"])


def test_sampled_trace_matches_with_recorded_tokens(pipeline: Pipeline) -> None:
    io = {k: v.numpy() for k, v in part(tensors("io"), "ar_sample/").items()}
    forced = np.concatenate([io[f"idx/{s}"] for s in SCALES], 1)
    result = pipeline.generate(
        class_ids=io["label"],
        guidance_scale=3.0,
        top_k=14,
        top_p=0.95,
        forced_tokens=forced,
        trace=True,
    )
    assert result.trace is not None
    for scale in SCALES:
        expected = io[f"logits_cfg/{scale}"]
        np.testing.assert_allclose(result.trace.logits[scale], expected, atol=1e-4, rtol=0)
        latent = result.trace.latents[scale]
        np.testing.assert_allclose(latent, io[f"f_hat/{scale}"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(result.trace.image, io["img"], atol=1e-4, rtol=0)


def test_smooth_trace_matches_with_recorded_noise(pipeline: Pipeline) -> None:
    io = {k: v.numpy() for k, v in part(tensors("io"), "ar_smooth/").items()}
    gumbel = np.concatenate([io[f"gumbel_noise/{s}"] for s in SCALES], 1)
    result = pipeline.generate(
        class_ids=io["label"],
        guidance_scale=5.0,
        top_k=14,
        top_p=0.9,
        more_smooth=True,
        gumbel=gumbel,
        trace=True,
    )
    assert result.trace is not None
    for scale in SCALES:
        expected = io[f"logits_cfg/{scale}"]
        # A temperature of 0.0135 at the last scale amplifies rounding.
        np.testing.assert_allclose(result.trace.logits[scale], expected, atol=2e-4, rtol=0)
    np.testing.assert_allclose(result.trace.image, io["img"], atol=2e-4, rtol=0)


def test_recorded_noise_draws_the_recorded_tokens() -> None:
    """The published sampler, argmax(p / Exp(1)), draws from the distribution ours draws from."""
    io = part(tensors("io"), "ar_sample/")
    for scale in SCALES:
        probabilities = io[f"logits_filtered/{scale}"].softmax(-1)
        drawn = (probabilities / io[f"exp_noise/{scale}"]).argmax(-1)
        assert torch.equal(drawn, io[f"idx/{scale}"])


def test_one_uniform_per_token_draws_the_filtered_distribution() -> None:
    logits = tensors("io")["ar_sample/logits_filtered/1"][:1, :1]
    probabilities = logits.softmax(-1)[0, 0]
    count = 20_000
    uniforms = (torch.arange(count) + 0.5)[None] / count
    tokens = sample_by_inverse_cdf(logits.expand(1, count, -1), uniforms)
    frequency = tokens.flatten().bincount(minlength=64) / count
    # Stratified uniforms: every frequency is exact to one draw.
    torch.testing.assert_close(frequency, probabilities, atol=1.5 / count, rtol=0)


def test_extreme_uniforms_never_draw_a_filtered_token() -> None:
    logits = tensors("io")["ar_sample/logits_filtered/2"]
    for value in (0.0, 1.0 - 2**-24):
        tokens = sample_by_inverse_cdf(logits, torch.full(logits.shape[:2], value))
        assert torch.isfinite(logits.gather(-1, tokens[..., None])).all()


def test_fixture_settings_are_those_used_here() -> None:
    traces = document("config")["traces"]
    assert traces["ar_greedy"]["cfg"] == 1.5
    assert (traces["ar_sample"]["cfg"], traces["ar_smooth"]["cfg"]) == (2.0, 4.0)
