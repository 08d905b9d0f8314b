"""Settings of raster models have the meanings of the first implementations."""

import numpy as np
import pytest

from nsp.errors import ConfigError
from nsp.family.registry import family
from nsp.pipeline.pipeline import torch_pipeline
from nsp.raster.sampling import RasterSampling
from tests.raster.small import FAMILIES, codes_of, small_system, traced


@pytest.mark.parametrize("name", FAMILIES)
def test_temperature_0_is_greedy(name: str) -> None:
    pipeline = torch_pipeline(family(name), small_system(name, grid_side=2), device="cpu")
    greedy = traced(pipeline, seed=1, temperature=0.0, top_k=50, top_p=0.9)
    for tokens, logits in zip(greedy.tokens, greedy.logits, strict=True):
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_array_equal(codes_of(greedy), codes_of(traced(pipeline, seed=2, top_k=1)))


def test_greedy_is_recorded_under_one_name() -> None:
    asked = RasterSampling(temperature=0.0, top_k=100)
    assert (asked.temperature, asked.top_k, asked.greedy) == (1.0, 1, "top_k=1")
    assert RasterSampling.from_dict(asked.to_dict()) == asked
    for value in (-1.0, 1e-9):
        with pytest.raises(ConfigError, match="temperature="):
            RasterSampling(temperature=value)
