"""Attention over a KV cache that is an argument and a result, never module state.

Axes: G rows (conditional and null), L new tokens, P cached tokens, H heads, J key and value
heads, S query heads of each, K head width.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

KeyValue: TypeAlias = tuple[Tensor, Tensor]
Attend: TypeAlias = Callable[..., tuple[Tensor, KeyValue]]


def l2_normalize(x: Tensor) -> Tensor:
    """Return `x` divided by its norm along the last axis; float32, as float16 has no eps 1e-12."""
    x = x.float()  # F.normalize would be exported with its norms expanded to the size of x
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(1e-12)


def attend_delta(
    q_GLHK: Tensor, k_GLHK: Tensor, v_GLHK: Tensor, past: KeyValue | None, *, scale: float
) -> tuple[Tensor, KeyValue]:
    """Return attention (G,L,H,K) over past and new tokens, and the *new* keys and values only.

    The cache is token-major, (P,G,H,K): new tokens are one contiguous slice of the arena, so an
    engine writes them in place. It uses only matrix products and a softmax, which every ONNX
    runtime and TensorRT parser supports.
    """
    new_k, new_v = k_GLHK.transpose(0, 1), v_GLHK.transpose(0, 1)
    all_k, all_v = new_k, new_v
    if past is not None:
        all_k, all_v = torch.cat([past[0], new_k]), torch.cat([past[1], new_v])
    mixed = F.scaled_dot_product_attention(
        q_GLHK.transpose(1, 2), all_k.permute(1, 2, 0, 3), all_v.permute(1, 2, 0, 3), scale=scale
    )
    return mixed.transpose(1, 2), (new_k, new_v)


def attend_present(
    q_GLHK: Tensor, k_GLHK: Tensor, v_GLHK: Tensor, past: KeyValue, *, scale: float
) -> tuple[Tensor, KeyValue]:
    """Return attention (G,L,H,K), and *all* keys and values (G,H,P+L,K).

    One ONNX Attention operator (opset 23) joins past and new: fastest on the CPU of ONNX Runtime,
    refused by TensorRT's parsers.
    """
    mixed, present_k, present_v, _ = torch.onnx.ops.attention(
        q_GLHK.transpose(1, 2),
        k_GLHK.transpose(1, 2),
        v_GLHK.transpose(1, 2),
        past_key=past[0],
        past_value=past[1],
        scale=scale,
    )
    return mixed.transpose(1, 2), (present_k, present_v)


def attend_past(
    q_G1HK: Tensor, k_G1JK: Tensor, v_G1JK: Tensor, past: KeyValue, mask: Tensor, *, scale: float
) -> Tensor:
    """Return attention (G,1,H,K) of one new token over past tokens (P,G,J,K) and itself.

    Past and new tokens are never joined, which would copy the cache for every token. `mask` is
    added to the past's scores (..., P); the token itself always counts. H is a multiple of J: query
    head i reads key head i // (H/J). Scores and softmax are in float32.
    """
    rows, _, num_heads, width = q_G1HK.shape
    num_shared = num_heads // k_G1JK.shape[2]
    q_GJSK = (q_G1HK * scale).reshape(rows, -1, num_shared, width)
    scores = (q_GJSK @ past[0].permute(1, 2, 3, 0)).float() + mask
    own = (q_GJSK * k_G1JK.transpose(1, 2)).float().sum(-1, keepdim=True)
    weights = torch.cat([scores, own], -1).softmax(-1).to(q_G1HK.dtype)
    mixed = weights[..., :-1] @ past[1].permute(1, 2, 0, 3)
    mixed = mixed + weights[..., -1:] * v_G1JK.transpose(1, 2)
    return mixed.reshape(rows, 1, num_heads, width)


def attend_masked(
    q_GLHK: Tensor, k_GLHK: Tensor, v_GLHK: Tensor, past: Tensor | None, *, scale: float
) -> tuple[Tensor, KeyValue]:
    """Return attention (G,L,H,K) under an additive mask (L,L), and the keys and values: training.

    The mask is given instead of a cache.
    """
    mixed = F.scaled_dot_product_attention(
        q_GLHK.transpose(1, 2),
        k_GLHK.transpose(1, 2),
        v_GLHK.transpose(1, 2),
        attn_mask=None if past is None else past.to(q_GLHK.dtype),
        scale=scale,
    )
    return mixed.transpose(1, 2), (k_GLHK, v_GLHK)
