"""Rotary position tables of grids (Su et al. 2021, arXiv:2104.09864, once per axis).

Axes: L positions, K head width, pairs of neighbouring channels (2i, 2i + 1).
"""

import torch
from torch import Tensor


def grid_rotary(side: int, head_width: int, *, base: float = 10_000.0) -> Tensor:
    """Return (cos, sin) of every cell of a square grid in raster order, (side^2, K/2, 2), float32.

    The first half of the pairs turns with the row, the second with the column, at angles n
    base^(-2i / (K/2)). Source: github.com/FoundationVision/LlamaGen,
    autoregressive/models/gpt.py, precompute_freqs_cis_2d.
    """
    half = head_width // 2
    rates = base ** (-torch.arange(0, half, 2)[: half // 2].float() / half)
    angles_GI = torch.outer(torch.arange(side).float(), rates)
    rows = angles_GI[:, None].expand(-1, side, -1)
    cols = angles_GI[None].expand(side, -1, -1)
    angles = torch.cat([rows, cols], -1).flatten(0, 1)
    return torch.stack([angles.cos(), angles.sin()], -1)


def joined_turns(rows_YR2: Tensor, columns_XR2: Tensor) -> Tensor:
    """Return the table (YX, K/2, 2) of a grid in raster order: turns by row, then by column."""
    rows = rows_YR2[:, None].expand(-1, columns_XR2.shape[0], -1, -1)
    columns = columns_XR2[None].expand(rows_YR2.shape[0], -1, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


def rotate_pairs(x_GLHK: Tensor, table_LK2: Tensor) -> Tensor:
    """Return `x` with its pairs of neighbouring channels turned, computed in float32."""
    even, odd = x_GLHK.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table_LK2[:, None].unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return turned.flatten(-2).to(x_GLHK.dtype)
