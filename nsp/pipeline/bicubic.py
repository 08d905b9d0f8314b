"""Resizes float pictures as `torch.nn.functional.interpolate(mode="bicubic")` does, without torch.

Published figures of models of 384 px are those of their pictures at 256 px, resized in this way
before they become 8-bit numbers.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

_A = -0.75  # the cubic kernel's free number, as in torch and OpenCV


def resize_bicubic(image_BCHW: NDArray[np.float32], size_px: int) -> NDArray[np.float32]:
    """Return pictures (B, C, size_px, size_px); values may leave the range of the given ones.

    Nothing is smoothed before pictures get smaller (antialias=False), and outside of a picture its
    border continues. Source: torch, aten/src/ATen/native/UpSample.h, align_corners=False; Keys
    1981, doi:10.1109/TASSP.1981.1163711.
    """
    height, width = image_BCHW.shape[2:]
    down_hH, across_wW = _weights(height, size_px), _weights(width, size_px)
    return np.asarray(down_hH @ image_BCHW @ across_wW.T, np.float32)


@cache
def _weights(size: int, wanted: int) -> NDArray[np.float32]:
    """Return the share (wanted, size) of every pixel of a line in each wanted pixel."""
    place = (np.arange(wanted) + 0.5) * (size / wanted) - 0.5
    first = np.floor(place).astype(np.int64)
    weights = np.zeros((wanted, size))
    for tap in (-1, 0, 1, 2):
        source = (first + tap).clip(0, size - 1)
        np.add.at(weights, (np.arange(wanted), source), _cubic(np.abs(place - first - tap)))
    return weights.astype(np.float32)


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * _A - 4 * _A
    return np.asarray(np.where(distance <= 1, near, far))
