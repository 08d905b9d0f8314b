"""Attention of one new token that writes its key and value into the cache: layout "in_place".

Axes: G rows (conditional and null), S tokens that the cache has room for, H heads, J key and value
heads, K head width, M = (H + 2 J) K. Queries, keys and values come as one tensor, as one product
makes them: ONNX Runtime turns, stores and attends in one operator
(export/graph/in_place_operator.py), and this is what it computes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nsp.layers.rotary import rotate_pairs


@torch.library.custom_op("nsp::attend_in_place", mutates_args=())
def attend_in_place(
    packed_G1M: Tensor,
    past_k_GJSK: Tensor,
    past_v_GJSK: Tensor,
    position_G: Tensor,
    table_SK2: Tensor | None,
    bias_G11S: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention (G, 1, H K) over the tokens so far, and keys and values (G, J, S, K).

    The token is stored at its position, the same in all rows, which is also its row of the rotary
    table; without a table nothing is turned. `bias_G11S` is added to the scores. What the cache
    holds behind that position has no effect, but must be finite.
    """
    position = position_G[:1]
    num_shared, tokens, width = past_k_GJSK.shape[1:]
    heads_G1HK = packed_G1M.unflatten(-1, (-1, width))
    turned, v_G1JK = heads_G1HK.split((heads_G1HK.shape[2] - num_shared, num_shared), dim=2)
    if table_SK2 is not None:
        turned = rotate_pairs(turned, table_SK2.index_select(0, position))
    q_G1HK, k_G1JK = turned.split((turned.shape[2] - num_shared, num_shared), dim=2)
    at_S1 = torch.arange(tokens, device=position.device)[:, None]
    k = torch.where(at_S1 == position, k_G1JK.transpose(1, 2), past_k_GJSK)
    v = torch.where(at_S1 == position, v_G1JK.transpose(1, 2), past_v_GJSK)
    mask = torch.where(at_S1[:, 0] <= position, 0.0, -torch.inf)
    if bias_G11S is not None:
        mask = mask + bias_G11S
    mask = mask.to(k.dtype).expand(len(k), 1, 1, -1)
    mixed = F.scaled_dot_product_attention(
        q_G1HK.transpose(1, 2), k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return mixed.transpose(1, 2).flatten(2), k, v


def stored(new_LGJK: Tensor, num_tokens: int) -> Tensor:
    """Return the first keys or values of a cache of `num_tokens`, (G, J, S, K), zero behind."""
    return F.pad(new_LGJK.permute(1, 2, 0, 3), (0, 0, 0, num_tokens - new_LGJK.shape[0]))


@attend_in_place.register_fake
def _shapes(
    packed_G1M: Tensor,
    past_k_GJSK: Tensor,
    past_v_GJSK: Tensor,
    position_G: Tensor,
    table_SK2: Tensor | None,
    bias_G11S: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return results without content."""
    _, num_shared, _, width = past_k_GJSK.shape
    mixed = packed_G1M.shape[-1] - 2 * num_shared * width
    made = packed_G1M.new_empty(packed_G1M.shape[0], 1, mixed)
    return made, torch.empty_like(past_k_GJSK), torch.empty_like(past_v_GJSK)
