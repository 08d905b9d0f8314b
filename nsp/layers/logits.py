"""Guidance, filtering and drawing of tokens as pure tensor functions, in float32.

Every setting is one number per image, so images that share a batch need not share settings.
Axes: B images, G rows (B, or 2B with the null condition last), L tokens, V codes, R ranks.
"""

import torch
from torch import Tensor

_HALVINGS = 26  # halve an interval of at most 104 down to its float32 spacing
_LOWEST = -200.0  # below every threshold


def apply_guidance(found_G: Tensor, guidance_B: Tensor) -> Tensor:
    """Return the guided output (B, ...): null + guidance (conditional - null), row by row.

    A row of guidance 1 is exactly its conditional output, whatever the guidance of other rows. The
    first B of the G rows are conditional, the last B null; without null rows (G = B) both are the
    same. Source: Ho & Salimans 2022, arXiv:2207.12598, with guidance = 1 + w.
    """
    batch = guidance_B.shape[0]
    conditional, null = found_G[:batch], found_G[found_G.shape[0] - batch :]
    guidance = guidance_B.reshape(-1, *[1] * (found_G.dim() - 1))
    # Without this case, rounding of the sum would change the conditional output.
    return torch.where(guidance == 1, conditional, null + guidance * (conditional - null))


def filter_by_rank(x_BLV: Tensor, top_p_B: Tensor, top_k_B: Tensor, ranks_R: Tensor) -> Tensor:
    """Return the logits with -inf for entries that a row's top-k, then its top-p removes.

    Entries equal to the last kept entry are kept. top-k keeps entries of at least the k-th largest
    value; 0 keeps all. top-p < 1 keeps an entry if the mass of strictly larger entries that top-k
    left is below p; the largest entry always stays. `ranks_R` counts from 0: R of the largest
    logits are sorted. R must be at least 1 and every row's k, and V if a row has top-p without
    top-k.
    """
    top_p, top_k = _per_row(top_p_B), _per_row(top_k_B)
    ranked = x_BLV.topk(ranks_R.shape[0], dim=-1).values
    in_k = (ranks_R < top_k) | (top_k == 0)
    # A filter that is off has a threshold without effect: operations over all codes are costly.
    in_top_k = x_BLV >= torch.where(top_k == 0, -torch.inf, _least(ranked, in_k))
    largest = ranked[..., :1]
    total = torch.where(in_top_k, (x_BLV - largest).exp(), 0.0).sum(-1, keepdim=True)
    share = (ranked - largest).exp() / total
    above = share.cumsum(-1) - share
    threshold = _least(ranked, ((above < top_p) | (top_p >= 1)) & in_k)
    threshold = torch.where((top_k == 0) & (top_p >= 1), -torch.inf, threshold)
    return torch.where(x_BLV >= threshold, x_BLV, -torch.inf)


def filter_by_mass(x_BLV: Tensor, top_p_B: Tensor, top_k_B: Tensor, ranks_R: Tensor) -> Tensor:
    """Return the same as `filter_by_rank`, without sorting for top-p; only top-k uses `ranks_R`.

    This is for runtimes that cannot sort V codes. The threshold of top-p is found by halving its
    interval, so both functions agree up to rounding and up to logits that differ by less than 2e-6:
    an entry at the threshold may differ.
    """
    top_p, top_k = _per_row(top_p_B), _per_row(top_k_B)
    ranked = x_BLV.topk(ranks_R.shape[0], dim=-1).values
    least = torch.where(top_k == 0, -torch.inf, _least(ranked, ranks_R < top_k))
    in_top_k = x_BLV >= least
    below = x_BLV - ranked[..., :1]
    mass = torch.where(in_top_k, below.exp(), 0.0)
    total = mass.sum(-1, keepdim=True)
    # All V codes below this threshold together weigh less than 1 - p. float32 has no exp below
    # -104.
    reach = ((1 - top_p).clamp_min(1e-30) * total / x_BLV.shape[-1]).log() - 0.1
    low = reach.clamp(-104.0, -0.1)
    width = -low
    for halving in range(1, _HALVINGS + 1):
        middle = low + width * 2.0**-halving
        above = torch.where(below > middle, mass, 0.0).sum(-1, keepdim=True)
        # cat and amax, because TensorRT needs over 30 s to fuse 16 steps of two `where`.
        risen = torch.where(above < top_p * total, _LOWEST, middle)
        low = torch.cat([low, risen], -1).amax(-1, keepdim=True)
    keep = in_top_k & (below > torch.where(top_p >= 1, -torch.inf, low))
    return torch.where(keep, x_BLV, -torch.inf)


def _per_row(setting_B: Tensor) -> Tensor:
    return setting_B.reshape(-1, 1, 1)


def _least(ranked_BLR: Tensor, kept_BLR: Tensor) -> Tensor:
    """Return the smallest kept entry (B, L, 1)."""
    return torch.where(kept_BLR, ranked_BLR, torch.inf).amin(-1, keepdim=True)


def sample_by_inverse_cdf(logits_BLV: Tensor, uniforms_BL: Tensor) -> Tensor:
    """Return tokens (B, L): the first code whose cumulative probability exceeds the uniform number.

    Uniform numbers are in [0, 1).
    """
    cumulative = logits_BLV.softmax(-1).cumsum(-1)
    # The total is 1 only up to rounding; scaling the draw by it keeps every draw inside.
    target = uniforms_BL[..., None] * cumulative[..., -1:]
    # Counted in float32, exact below 2^24 codes: int64 would need six times the memory traffic.
    passed = (cumulative <= target).float().sum(-1).long()
    return passed.clamp_max(logits_BLV.shape[-1] - 1)
