"""What StageIO promises: one declaration, and every mistake in a feed named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsp.errors import ConfigError, FeedError
from nsp.families.var.config import SIZES, VarConfig
from nsp.stage.io import Axes, StageIO, sample_arrays
from tests.models import stages_io

STEP = StageIO(
    inputs={
        "x": Axes("G L 4"),
        "positions": Axes("L", "int64"),
        "past_k": Axes("G 2 P 8", "float16"),
        "top_p": Axes(""),
    },
    outputs={"logits": Axes("G L 16"), "new_k": Axes("G 2 P+L 8", "float16")},
)
SIZES_1 = {"G": 2, "L": 3, "P": 5}


def test_output_shapes_follow_from_sums_and_products() -> None:
    image = StageIO(inputs={"latent": Axes("B 4 h w")}, outputs={"image": Axes("B 3 16*h 8*w+2")})
    assert image.output_shapes({"B": 2, "h": 3, "w": 5}) == {"image": (2, 3, 48, 42)}


@pytest.mark.parametrize("word", ["L-1", "L/2", "f(L)", "L[0]", "1.5", "'L'", "L+", "__import__"])
def test_an_axis_is_a_name_an_integer_or_a_sum_or_product(word: str) -> None:
    if word == "__import__":  # a name like any other: nothing is ever evaluated
        assert Axes(word).shape({word: 3}) == (3,)
        return
    with pytest.raises(ConfigError, match="axis"):
        Axes(word)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="float8"):
        Axes("B", "float8")


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_check_finds_the_sizes_the_arrays_were_made_with(g: int, length: int, past: int) -> None:
    sizes = {"G": g, "L": length, "P": past}
    assert STEP.check(sample_arrays(STEP, sizes), "step") == sizes


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("x", np.zeros((2, 3, 5), "float32"), r"step: x has shape \(2, 3, 5\); expected \(G L 4\)"),
        ("x", np.zeros((2, 12), "float32"), r"step: x has shape \(2, 12\); expected \(G L 4\)"),
        ("positions", np.zeros(2, "int64"), r"positions has shape \(2,\); expected \(L\) with L=3"),
        ("positions", np.zeros(3, "int32"), "positions is int32; expected int64"),
        ("past_k", np.zeros((1, 2, 5, 8), "float16"), "past_k has shape .* with G=2"),
        ("past_k", np.zeros((2, 2, 5, 8), "float32"), "past_k is float32; expected float16"),
        ("top_p", np.zeros(1, "float32"), r"top_p has shape \(1,\); expected \(\)$"),
    ],
)
def test_a_wrong_feed_is_named_with_what_was_expected(
    name: str, array: np.ndarray, message: str
) -> None:
    with pytest.raises(FeedError, match=message):
        STEP.check({**sample_arrays(STEP, SIZES_1), name: array}, "step")


def test_missing_and_unknown_inputs_are_named() -> None:
    feeds = sample_arrays(STEP, SIZES_1)
    with pytest.raises(FeedError, match="step: unknown input 'mask'; the inputs are x, positions"):
        STEP.check({**feeds, "mask": feeds["x"]}, "step")
    del feeds["top_p"]
    with pytest.raises(FeedError, match="step: missing input 'top_p'"):
        STEP.check(feeds, "step")


def test_torch_tensors_are_checked_alike() -> None:
    import torch

    feeds = {name: torch.from_numpy(a) for name, a in sample_arrays(STEP, SIZES_1).items()}
    assert STEP.check(feeds, "step") == SIZES_1
    with pytest.raises(FeedError, match="x is float64; expected float32"):
        STEP.check({**feeds, "x": feeds["x"].double()}, "step")


@given(
    st.lists(
        st.fixed_dictionaries({"G": st.integers(1, 8), "L": st.integers(1, 9), "P": st.just(0)}),
        min_size=1,
        max_size=6,
    )
)
def test_a_profile_contains_every_size_it_was_made_from(steps: list[dict[str, int]]) -> None:
    past = 0
    for step in steps:
        step["P"], past = past, past + step["L"]
    profile = STEP.profile(steps)
    for step in steps:
        for name, shape in STEP.input_shapes(step).items():
            low, best, high = profile[name]
            assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
            assert best == STEP.input_shapes(steps[-1])[name]
    ends = [STEP.input_shapes(step)["x"] for step in steps]
    assert profile["x"][0] == tuple(map(min, zip(*ends, strict=True)))  # and no larger than needed


CONFIGS = [SIZES["tiny"], SIZES["emoji"], SIZES["d16"]]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", ["delta", "present"])
def test_a_declaration_survives_the_manifest(config: VarConfig, layout: str) -> None:
    for io in stages_io(config, layout, "float16").values():
        assert StageIO.from_dict(io.to_dict()) == io


@pytest.mark.parametrize("values", [{}, {"inputs": {}}, {"inputs": {"x": 1}, "outputs": {}}, None])
def test_what_is_no_declaration_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        StageIO.from_dict(values)
