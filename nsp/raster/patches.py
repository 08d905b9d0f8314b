"""Patches of codes: training targets coarser than codes (Pang et al. 2024, arXiv:2412.15321).

A patch is a square of codes, not a run of them. Axes: B batch, N codes in raster order, D width, p
side of a patch, M = N / p^2 patches in raster order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def patched(values_BN: Tensor, side: int, patch_side: int) -> Tensor:
    """Return what belongs to every patch, (B, M, p^2, ...), from (B, N, ...)."""
    count = side // patch_side
    cells = values_BN.unflatten(1, (count, patch_side, count, patch_side))
    patches: Tensor = cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return patches


def averaged(embedded_BND: Tensor, side: int, patch_side: int) -> Tensor:
    """Return the mean embedding (B, M, D) of the codes of every patch."""
    if patch_side == 1:
        return embedded_BND
    return patched(embedded_BND, side, patch_side).mean(2)


def patch_loss(logits_BMV: Tensor, codes_BN: Tensor, side: int, patch_side: int) -> Tensor:
    """Return the cross entropy (B, M), in nats: the mean over the codes of every patch.

    All codes of a patch are scored against its one distribution.
    """
    targets_BMp = patched(codes_BN, side, patch_side)
    log_shares = F.log_softmax(logits_BMV.float(), -1)
    return -torch.gather(log_shares, 2, targets_BMp).mean(2)
