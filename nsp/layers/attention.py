"""Attention over a KV cache that is an argument and a result, never module state.

Axes: G rows (conditional and null), L new tokens, P cached tokens, H heads, K head width.
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
