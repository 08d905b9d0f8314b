"""What the KV arena promises: both layouts hold the same cache, and nothing is lost or moved."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nsp.stage.arena import (
    ARENAS,
    DeltaArena,
    FixedArena,
    HostArrays,
    InPlaceArena,
    KVArena,
    KVShape,
    PresentArena,
    past_spans,
)

UNPADDED = ("delta", "present")


class Host(HostArrays):
    """Host memory, which keeps what it allocates."""

    def __init__(self) -> None:
        self.buffers: list[NDArray[np.float32]] = []

    def allocate(self, shape: tuple[int, ...], dtype: str) -> NDArray[np.float32]:
        # NaN, so that reading what was never written shows.
        self.buffers.append(np.full(shape, np.nan, dtype))
        return self.buffers[-1]


def shape_for(schedule: list[int], rows: int = 2) -> KVShape:
    return KVShape(
        num_layers=2,
        num_tokens=sum(schedule),
        rows=rows,
        num_heads=3,
        head_width=4,
        dtype="float32",
    )


def new_entries(kv: KVShape, start: int, length: int) -> dict[str, NDArray[np.float32]]:
    """Return distinct keys and values (L, G, H, K) for the tokens of one step."""
    result = {}
    for layer in range(kv.num_layers):
        for sign, kind in ((1, "k"), (-1, "v")):
            token, row, head, lane = np.ogrid[
                start : start + length, : kv.rows, : kv.num_heads, : kv.head_width
            ]
            values = ((token * 10 + row) * 10 + head) * 10 + lane + layer * 100_000
            result[f"{kind}_{layer}"] = (sign * values).astype(np.float32)
    return result


def grow(arena: KVArena, length: int) -> None:
    """Do what the `step` stage of this layout does."""
    past, new = arena.past(), arena.new(length)
    for name, values in new_entries(arena.shape, arena.length, length).items():
        if isinstance(arena, PresentArena):
            joined = np.concatenate([past[f"past_{name}"], values.transpose(1, 2, 0, 3)], axis=2)
            new[f"new_{name}"][:] = joined
        elif isinstance(arena, InPlaceArena):
            place = slice(arena.length, arena.length + length)
            new[f"new_{name}"][:, :, place] = values.transpose(1, 2, 0, 3)
        else:
            new[f"new_{name}"][:] = values
    arena.advance(length)


def token_major(arena: KVArena) -> dict[str, NDArray[np.float32]]:
    swap = isinstance(arena, PresentArena | InPlaceArena)
    found = {n: a.transpose(2, 0, 1, 3) if swap else a for n, a in arena.past().items()}
    return {name: array[: arena.length] for name, array in found.items()}


schedules = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@given(schedules, st.integers(1, 3))
def test_both_layouts_hold_the_whole_past_after_every_step(schedule: list[int], rows: int) -> None:
    kv = shape_for(schedule, rows)
    delta, present = DeltaArena(kv, Host()), PresentArena(kv, Host())
    for length in schedule:
        grow(delta, length)
        grow(present, length)
        expected = new_entries(kv, 0, delta.length)
        for arena in (delta, present):
            for name, values in token_major(arena).items():
                np.testing.assert_array_equal(values, expected[name.removeprefix("past_")])
    assert delta.length == present.length == kv.num_tokens


@pytest.mark.parametrize("layout", ARENAS)
@pytest.mark.parametrize("kept_after", [0, 1, 2])
def test_the_first_rows_can_be_kept_alone(layout: str, kept_after: int) -> None:
    schedule = [1, 4, 9]
    arena = ARENAS[layout](shape_for(schedule, rows=4), Host())
    for scale, length in enumerate(schedule):
        if scale == kept_after:
            arena.keep_rows(2)
        grow(arena, length)
    expected = new_entries(shape_for(schedule, rows=2), 0, arena.length)
    for name, values in token_major(arena).items():
        np.testing.assert_array_equal(values, expected[name.removeprefix("past_")])


@pytest.mark.parametrize("layout", ARENAS)
def test_a_cleared_arena_is_as_new(layout: str) -> None:
    arena = ARENAS[layout](shape_for([1, 4], rows=4), Host())
    grow(arena, 1)
    first = arena.past()["past_k_0"].ctypes.data
    arena.keep_rows(2)
    arena.clear()
    for length in (1, 4):
        grow(arena, length)
    expected = new_entries(shape_for([1, 4], rows=4), 0, arena.length)
    for name, values in token_major(arena).items():
        np.testing.assert_array_equal(values, expected[name.removeprefix("past_")])
    arena.clear()
    grow(arena, 1)
    assert arena.past()["past_k_0"].ctypes.data == first


@pytest.mark.parametrize("layout", UNPADDED)
def test_an_empty_past_has_the_address_of_the_arena(layout: str) -> None:
    host = Host()
    past = ARENAS[layout](shape_for([1, 4]), host).past()
    assert all(array.size == 0 for array in past.values())
    assert {a.ctypes.data for a in past.values()} <= {b.ctypes.data for b in host.buffers} - {0}


@pytest.mark.parametrize("layout", UNPADDED)
def test_views_are_contiguous_and_new_entries_never_overlap_the_past(layout: str) -> None:
    arena = ARENAS[layout](shape_for([2, 3]), Host())
    for length in (2, 3):
        past, new = arena.past(), arena.new(length)
        for old, fresh in zip(past.values(), new.values(), strict=True):
            assert old.flags.c_contiguous
            assert fresh.flags.c_contiguous
            assert not np.shares_memory(old, fresh)
        grow(arena, length)


def test_the_delta_layout_allocates_each_entry_once_and_moves_nothing() -> None:
    kv, host = shape_for([1, 4, 9]), Host()
    arena = DeltaArena(kv, host)
    before = arena.new(1)["new_k_0"].ctypes.data
    for length in (1, 4, 9):
        grow(arena, length)
    assert arena.past()["past_k_0"].ctypes.data == before
    sizes = [buffer.size for buffer in host.buffers]
    assert sum(sizes) == 2 * kv.num_layers * kv.num_tokens * kv.rows * kv.num_heads * kv.head_width


@given(st.integers(1, 2000))
def test_a_cache_has_at_most_four_spans_and_the_last_holds_it(num_tokens: int) -> None:
    spans = past_spans(num_tokens)
    assert len(spans) <= 4
    assert spans[-1] - 16 * 4 < num_tokens <= spans[-1]
    assert all(span % 16 == 0 for span in spans)


def test_the_fixed_layout_pads_the_past_to_its_span_with_finite_numbers() -> None:
    kv = shape_for([1] * 70)
    arena, sizes = FixedArena(kv, Host()), []
    for _ in range(70):
        past = arena.past()["past_k_0"]
        assert np.isfinite(past).all()
        sizes.append(len(past))
        grow(arena, 1)
    assert sizes == [32] * 33 + [64] * 32 + [96] * 5
    arena.keep_rows(1)
    assert np.isfinite(arena.past()["past_k_0"]).all()


def test_in_place_a_stage_reads_and_writes_the_same_finite_arrays() -> None:
    arena = InPlaceArena(shape_for([1, 4], rows=4), Host())
    arena.keep_rows(2)
    grow(arena, 1)
    past, new = arena.past(), arena.new(4)
    for old, fresh in zip(past.values(), new.values(), strict=True):
        assert old.shape == fresh.shape == (2, 3, 5, 4)
        assert old.ctypes.data == fresh.ctypes.data
        assert old.flags.c_contiguous
        assert np.isfinite(old).all()
