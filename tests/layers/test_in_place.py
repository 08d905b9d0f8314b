"""What attention in place promises: the same as attention over a past and the token itself."""

import pytest
import torch

from nsp.layers.attention import attend_past
from nsp.layers.in_place import attend_in_place, stored
from nsp.layers.rotary import grid_rotary, rotate_pairs

ROWS, HEADS, SHARED, WIDTH, TOKENS, POSITION = 2, 4, 2, 8, 9, 5


@pytest.mark.parametrize("turns", [False, True])
def test_it_equals_attention_over_the_past_and_stores_the_token(turns: bool) -> None:
    torch.manual_seed(0)
    table = grid_rotary(3, WIDTH)
    packed = torch.randn(ROWS, 1, (HEADS + 2 * SHARED) * WIDTH)
    past = torch.randn(2, POSITION, ROWS, SHARED, WIDTH)
    wholes = [stored(each, TOKENS) for each in past]
    for whole in wholes:
        whole[:, :, POSITION:] = 1e6  # what an earlier batch left
    position, scale = torch.tensor([POSITION]), WIDTH**-0.5
    mixed, *new = attend_in_place(
        packed, *wholes, position.expand(ROWS), table if turns else None, None, scale
    )
    q, k, v = packed.unflatten(-1, (-1, WIDTH)).split((HEADS, SHARED, SHARED), dim=2)
    if turns:
        q, k = (rotate_pairs(each, table[POSITION : POSITION + 1]) for each in (q, k))
    expected = attend_past(q, k, v, (past[0], past[1]), torch.zeros(POSITION), scale=scale)
    torch.testing.assert_close(mixed, expected.flatten(2))
    for before, after, token in zip(wholes, new, (k, v), strict=True):
        torch.testing.assert_close(after[:, :, POSITION], token[:, 0])
        before[:, :, POSITION] = token[:, 0]
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_bias_leaves_tokens_out() -> None:
    torch.manual_seed(0)
    packed = torch.randn(ROWS, 1, 3 * SHARED * WIDTH)
    past = torch.randn(2, ROWS, SHARED, TOKENS, WIDTH)
    bias = torch.zeros(ROWS, 1, 1, TOKENS)
    bias[0, ..., :2] = -torch.inf
    at = torch.full((ROWS,), POSITION)
    found, *_ = attend_in_place(packed, past[0], past[1], at, None, bias, 0.5)
    past[:, 0, :, :2] = 7.0  # the row that leaves them out does not see them
    again, *_ = attend_in_place(packed, past[0], past[1], at, None, bias, 0.5)
    torch.testing.assert_close(found, again, rtol=0, atol=0)
