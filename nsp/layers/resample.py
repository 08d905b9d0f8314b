"""Area, bilinear and bicubic resizing of maps as constant matrices.

The filters are separable and linear, so Y = R X C^T with a row matrix R and a column matrix C. One
matrix product computes the same numbers in PyTorch, ONNX Runtime and TensorRT; a Resize operator
does not.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

_BICUBIC_A = -0.75  # the coefficient of torch.nn.functional.interpolate


@cache
def area_matrix(size_in: int, size_out: int) -> NDArray[np.float32]:
    """Return the (size_out, size_in) matrix of adaptive average pooling along one axis.

    Output i averages inputs floor(i n/p) .. ceil((i+1) n/p) - 1; windows overlap if p does not
    divide n. Equals `torch.nn.functional.interpolate(mode="area")` to 1e-6.
    """
    matrix = np.zeros((size_out, size_in), np.float64)
    for i in range(size_out):
        start = i * size_in // size_out
        stop = -((-(i + 1) * size_in) // size_out)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return _frozen(matrix)


@cache
def bicubic_matrix(size_in: int, size_out: int) -> NDArray[np.float32]:
    """Return the (size_out, size_in) matrix of bicubic resizing along one axis.

    Half-pixel centres, a = -0.75, clamped border, no antialiasing; the identity where the sizes
    agree. Equals `torch.nn.functional.interpolate(mode="bicubic")` to 1e-6.
    """
    matrix = np.zeros((size_out, size_in), np.float64)
    for i in range(size_out):
        centre = (i + 0.5) * size_in / size_out - 0.5
        first = int(np.floor(centre))
        for tap in range(-1, 3):
            column = min(max(first + tap, 0), size_in - 1)
            matrix[i, column] += _cubic(abs(centre - (first + tap)))
    return _frozen(matrix)


@cache
def bilinear_matrix(size_in: int, size_out: int) -> NDArray[np.float32]:
    """Return the (size_out, size_in) matrix of bilinear resizing along one axis.

    Half-pixel centres, clamped border, no antialiasing. Equals
    `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` to 1e-6.
    """
    matrix = np.zeros((size_out, size_in), np.float64)
    for i in range(size_out):
        centre = max((i + 0.5) * size_in / size_out - 0.5, 0.0)
        first = int(centre)
        share = centre - first
        matrix[i, first] += 1 - share
        matrix[i, min(first + 1, size_in - 1)] += share
    return _frozen(matrix)


def _cubic(distance: float) -> float:
    """Return the Keys cubic convolution kernel at `distance` >= 0 (Keys 1981, eq. 15)."""
    a = _BICUBIC_A
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance**2 + 1
    if distance < 2:
        return ((distance - 5) * distance + 8) * a * distance - 4 * a
    return 0.0


def _frozen(matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the matrix in float32, read-only because it is cached and shared."""
    result = matrix.astype(np.float32)
    result.setflags(write=False)
    return result
