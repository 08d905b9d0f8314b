"""An image does not depend on its batch mates or on their settings, in any family."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsp.errors import ConfigError
from nsp.family.order import Order, Sampling
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from tests.families.next_scale.models import new_tiny_checkpoint as new_growing_checkpoint

PROMPTS = ("red apple", "green apple", "smiling cat", "")
_LATENT_ERROR = 1e-5  # of the range: what rounds with another batch
_TOKEN_MARGIN = 1e-5  # of the cumulative distribution, in float32


@pytest.fixture(scope="module")
def var_pipe(tiny_checkpoint: Any) -> Pipeline:
    return load_pipeline(tiny_checkpoint, device="cpu")


def var_orders() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Return lists of settings; intervals of guidance that begin late are among them."""
    schedules = st.one_of(
        st.just({"guidance_schedule": "ramp"}),
        st.just({"guidance_schedule": "constant"}),
        st.sampled_from([(0.0, 1.0), (0.5, 1.0), (0.9, 1.0)]).map(
            lambda ends: {"guidance_schedule": "interval", "guidance_interval": ends}
        ),
    )
    one = st.tuples(
        st.fixed_dictionaries(
            {
                "guidance_scale": st.sampled_from([1.0, 1.5, 4.0]),
                "temperature": st.sampled_from([0.7, 1.0, 1.3]),
                "top_k": st.sampled_from([0, 1, 5, 40]),
                "top_p": st.sampled_from([0.5, 0.9, 1.0]),
            }
        ),
        schedules,
    )
    return st.lists(one.map(lambda parts: {**parts[0], **parts[1]}), min_size=2, max_size=6)


def together_by_key(
    pipe: Pipeline, orders: list[Order[Sampling]]
) -> dict[int, tuple[Any, Any, int]]:
    """Return every order's tokens and latent, made in the largest batches that it may share."""
    groups: dict[Any, list[int]] = {}
    for place, order in enumerate(orders):
        groups.setdefault(pipe.check_order(order), []).append(place)
    found = {}
    for places in groups.values():
        trace = pipe.trace([orders[place] for place in places])
        for row, place in enumerate(places):
            tokens = [each[row] for each in trace.tokens]
            found[place] = (tokens, trace.latents[-1][row], len(places))
    return found


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    wanted=var_orders(), seed=st.integers(0, 1000), negative=st.sampled_from([None, "dog", "cat"])
)
def test_a_token_image_is_what_it_is_alone(
    var_pipe: Pipeline, wanted: list[dict[str, Any]], seed: int, negative: str | None
) -> None:
    orders = [
        Order(
            PROMPTS[n % 3],
            seed + n,
            var_pipe.sampling.changed(each),
            negative if n % 2 else None,
        )
        for n, each in enumerate(wanted)
    ]
    among = together_by_key(var_pipe, orders)
    for place, order in enumerate(orders):
        alone = var_pipe.trace([order])
        tokens, latent, _ = among[place]
        differ = [int((a[0] != b).sum()) for a, b in zip(alone.tokens, tokens, strict=True)]
        if any(differ):  # a draw beside an edge: what follows is another picture, rightly
            first = next(scale for scale, count in enumerate(differ) if count)
            assert differ[first] == 1, (order, differ)
            assert margin_of(var_pipe, order, alone, first) < _TOKEN_MARGIN
            continue
        span = float(np.ptp(alone.latents[-1]))
        np.testing.assert_allclose(alone.latents[-1][0], latent, atol=_LATENT_ERROR * span)


def margin_of(pipe: Pipeline, order: Order[Sampling], trace: Any, scale: int) -> float:
    """Return the smallest distance of a draw of one scale to an edge of its token's interval."""
    import torch

    from nsp.family.code_sampling import draw_uniforms
    from nsp.layers.logits import filter_by_rank

    sampling, codes = order.sampling, pipe.config.vae.vocab_size
    start = sum(side**2 for side in pipe.config.patch_nums[:scale])
    length = pipe.config.patch_nums[scale] ** 2
    draws = draw_uniforms(order.seed, pipe.config.num_tokens)[start : start + length]
    scaled = torch.from_numpy(trace.logits[scale]) / sampling.temperature
    kept = filter_by_rank(
        scaled, torch.tensor([sampling.top_p]), torch.tensor([sampling.top_k]), torch.arange(codes)
    )
    edges = kept[0].double().softmax(-1).cumsum(-1).numpy()
    return float(np.abs(edges - draws[:, None]).min())


def test_a_row_with_guidance_1_is_exactly_the_unguided_one_beside_guided_ones() -> None:
    import torch

    from nsp.layers.logits import apply_guidance

    logits = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    logits[2] = float("inf")  # a null row that must not leak
    guided = apply_guidance(logits, torch.tensor([1.0, 3.0]))
    assert torch.equal(guided[0], logits[0])
    assert not torch.equal(guided[1], logits[1])


def test_guided_and_unguided_orders_are_told_apart_naming_the_setting(var_pipe: Pipeline) -> None:
    guided, plain = (
        Order("red apple", 1, var_pipe.sampling.changed({"guidance_scale": scale}))
        for scale in (3.0, 1.0)
    )
    with pytest.raises(ConfigError, match=r"order 1 .*guidance_scale=1\.0 instead of 3\.0"):
        var_pipe.check([guided, plain])
    assert [len(batch) for batch in var_pipe.batches([guided, plain, guided])] == [2, 1]


@pytest.fixture(scope="module")
def growing_pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = new_growing_checkpoint(tmp_path_factory.mktemp("growing") / "checkpoint")
    return load_pipeline(folder, device="cpu")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    wanted=st.lists(
        st.tuples(
            st.sampled_from([0.5, 1.5, 4.0, 7.5]),
            st.sampled_from(PROMPTS),
            st.sampled_from([None, "green apple"]),
        ),
        min_size=2,
        max_size=5,
    ),
    seed=st.integers(0, 1000),
)
def test_a_growing_latent_is_what_it_is_alone(
    growing_pipe: Pipeline, wanted: list[tuple[float, str, str | None]], seed: int
) -> None:
    orders = [
        Order(prompt, seed + n, growing_pipe.sampling.changed({"guidance_scale": scale}), negative)
        for n, (scale, prompt, negative) in enumerate(wanted)
    ]
    together = growing_pipe.trace(orders).latents
    for row, order in enumerate(orders):
        for among, alone in zip(together, growing_pipe.trace([order]).latents, strict=True):
            error = _LATENT_ERROR * float(np.ptp(alone))
            np.testing.assert_allclose(among[row], alone[0], rtol=0, atol=error)


def test_a_negative_prompt_changes_its_own_image_only(var_pipe: Pipeline) -> None:
    strong = var_pipe.sampling.changed({"guidance_scale": 6.0, "guidance_schedule": "constant"})
    one, other = Order("red apple", 5, strong), Order("red apple", 5, strong, "green apple")
    together = var_pipe.trace([one, other])
    assert not np.array_equal(together.latents[-1][0], together.latents[-1][1])
    for row, order in enumerate((one, other)):
        alone = var_pipe.trace([order]).latents[-1][0]
        np.testing.assert_allclose(together.latents[-1][row], alone, atol=1e-4)
