"""Guidance, filtering and drawing of tokens as pure tensor functions, in float32.

Axes: B images, G rows (B, or 2B with the null condition last), L tokens, V codes.
"""

import torch
from torch import Tensor


def apply_guidance(logits_GLV: Tensor, batch: int, guidance: Tensor) -> Tensor:
    """Return guided logits (B, L, V): null + guidance (conditional - null).

    Guidance 1.0 is the conditional output. The first `batch` rows are conditional, the last `batch`
    null; without null rows (G = B) both are the same. Source: Ho & Salimans 2022, arXiv:2207.12598,
    with guidance = 1 + w.
    """
    conditional, null = logits_GLV[:batch], logits_GLV[logits_GLV.shape[0] - batch :]
    return null + guidance * (conditional - null)


def filter_logits(logits_BLV: Tensor, num_ranks: int, top_p: Tensor) -> Tensor:
    """Return the logits with -inf where top-k, then top-p drops an entry; boundary ties are kept.

    top-k keeps what is at least the `num_ranks`-th largest. top-p < 1 keeps an entry while the mass
    strictly above it, of what top-k left, is below `top_p`; the largest always stays. `top_p` = 1
    leaves top-k alone, `top_p` > 1 keeps everything. The caller chooses the ranks to sort: k, or V
    for top-p without top-k, or 1 where nothing is filtered.
    """
    ranked = logits_BLV.topk(num_ranks, dim=-1).values
    in_top_k = logits_BLV >= ranked[..., -1:]
    largest = ranked[..., :1]
    total = torch.where(in_top_k, (logits_BLV - largest).exp(), 0.0).sum(-1, keepdim=True)
    share = (ranked - largest).exp() / total
    above = share.cumsum(-1) - share
    in_nucleus = (above < top_p) | (top_p >= 1)
    threshold = torch.where(in_nucleus, ranked, torch.inf).amin(-1, keepdim=True)
    return torch.where((logits_BLV >= threshold) | (top_p > 1), logits_BLV, -torch.inf)


def sample_by_inverse_cdf(logits_BLV: Tensor, uniforms_BL: Tensor) -> Tensor:
    """Return tokens (B, L): the first code whose cumulative probability exceeds the uniform number.

    Uniform numbers are in [0, 1).
    """
    cumulative = logits_BLV.softmax(-1).cumsum(-1)
    # The total is 1 only up to rounding; scaling the draw by it makes every draw land inside.
    target = uniforms_BL[..., None] * cumulative[..., -1:]
    # Counted in float32, exact below 2^24 codes: int64 would be six times the memory traffic.
    passed = (cumulative <= target).float().sum(-1).long()
    return passed.clamp_max(logits_BLV.shape[-1] - 1)
