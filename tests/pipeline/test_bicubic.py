"""Resized pictures are torch's, and their 8-bit numbers the goldens'."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from nsp.pipeline.bicubic import resize_bicubic
from nsp.pipeline.results import to_uint8

GOLDENS = load_file(Path(__file__).parents[1] / "goldens/evaluation/io.safetensors")


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 24), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_pictures_are_resized_as_torch_does(height: int, width: int, size: int, seed: int) -> None:
    image = np.random.default_rng(seed).random((2, 3, height, width), dtype=np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image), size=(size, size), mode="bicubic"
    )
    np.testing.assert_allclose(resize_bicubic(image, size), expected.numpy(), atol=3e-6)


def test_the_golden_picture_is_resized_before_it_becomes_8_bits() -> None:
    """The golden truncates 127.5 x + 128 of x in [-1, 1]: that rounds 255 p of p in [0, 1]."""
    image, size = (GOLDENS["final.image"] + 1) / 2, GOLDENS["final.resized"].shape[-1]
    resized = resize_bicubic(image, size)
    np.testing.assert_allclose(2 * resized - 1, GOLDENS["final.resized"], atol=2e-6)
    assert np.array_equal(to_uint8(image), GOLDENS["final.uint8"])
    assert np.array_equal(to_uint8(image, size_px=size), GOLDENS["final.resized_uint8"])


def test_a_picture_of_the_wanted_size_is_left_alone() -> None:
    image = np.random.default_rng(0).random((1, 3, 8, 8), dtype=np.float32)
    assert np.array_equal(to_uint8(image, size_px=8), to_uint8(image))
