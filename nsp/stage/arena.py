"""The KV arena: keys and values of all scale steps in buffers allocated once per image batch.

A step reads the past as a view of the first part, and its new keys and values are written in place;
nothing is joined on the host. Axes: S tokens of the whole schedule, P cached, L new, G rows, H
heads, K head width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from nsp.stage.io import Fed, Shape

_NUM_SPANS = 4


class Array(Fed, Protocol):
    """The operations that the runtime needs of a backend's arrays: only views."""

    def __getitem__(self, key: slice, /) -> Self:
        """Return a view of a slice of the first axis."""

    def reshape(self, shape: Shape, /) -> Self:
        """Return a view of another shape."""


@dataclass(frozen=True)
class KVShape:
    """Sizes of a cache."""

    num_layers: int
    num_tokens: int  # S, of the whole schedule
    rows: int  # G
    num_heads: int
    head_width: int
    dtype: str


class Memory(Protocol):
    """The operations that an arena needs of a backend."""

    def allocate(self, shape: Shape, dtype: str) -> Array:
        """Return uninitialised memory."""

    def copy_rows(self, source: Array, target: Array) -> None:
        """Fill `target` (P, N, ...) with the first N of `source` (P, G, ...)."""

    def fill_with_zeros(self, array: Array) -> None:
        """Fill an array with zeros."""


class HostArrays:
    """NumPy arrays as the memory of an arena."""

    def allocate(self, shape: Shape, dtype: str) -> NDArray[Any]:
        """Return uninitialised memory."""
        return np.empty(shape, dtype)

    def copy_rows(self, source: Array, target: Array) -> None:
        """Fill `target` (P, N, ...) with the first N of `source` (P, G, ...)."""
        assert isinstance(source, np.ndarray)
        assert isinstance(target, np.ndarray)
        target[...] = source[:, : target.shape[1]]

    def fill_with_zeros(self, array: Array) -> None:
        """Fill an array with zeros."""
        assert isinstance(array, np.ndarray)
        array.fill(0)


def is_cached(name: str) -> bool:
    """Return whether a stage's tensor of this name belongs to the cache, as past or new part."""
    return name.startswith(("past_k_", "past_v_", "new_k_", "new_v_"))


class KVArena(ABC):
    """Gives views of the past and space for new tokens; call `advance` after every step."""

    def __init__(self, shape: KVShape) -> None:
        self._whole_shape = shape
        self.shape, self.length = shape, 0

    def clear(self) -> None:
        """Start again, with all rows and nothing cached."""
        self.shape, self.length = self._whole_shape, 0

    @abstractmethod
    def keep_rows(self, rows: int) -> None:
        """Keep only the first `rows` rows, of the past and from now on."""

    @abstractmethod
    def past(self) -> dict[str, Array]:
        """Return the `past_*` inputs of the next step."""

    @abstractmethod
    def new(self, num_tokens: int) -> dict[str, Array]:
        """Return the buffers for the `new_*` outputs of a step of `num_tokens`."""

    def advance(self, num_tokens: int) -> None:
        """Count the tokens of a finished step as cached."""
        self.length += num_tokens

    def _names(self, prefix: str) -> list[str]:
        layers = range(self.shape.num_layers)
        return [f"{prefix}_{kind}_{i}" for i in layers for kind in ("k", "v")]


class DeltaArena(KVArena):
    """Token-major (S, G, H, K) buffers: the past is the first part, new tokens come after it."""

    def __init__(self, shape: KVShape, memory: Memory) -> None:
        super().__init__(shape)
        self._memory = memory
        self._buffers = self._whole = self._allocate(memory)

    def clear(self) -> None:
        """Start again, with all rows and nothing cached."""
        super().clear()
        self._buffers = self._whole

    def _allocate(self, memory: Memory) -> list[Array]:
        kv = self.shape
        full = (kv.num_tokens, kv.rows, kv.num_heads, kv.head_width)
        return [memory.allocate(full, kv.dtype) for _ in range(2 * kv.num_layers)]

    def keep_rows(self, rows: int) -> None:
        """Keep only the first `rows` rows; rows are inside tokens, so they are copied."""
        before, self.shape = self._buffers, replace(self.shape, rows=rows)
        self._buffers = self._allocate(self._memory)
        if self.length:
            for source, target in zip(before, self._buffers, strict=True):
                self._memory.copy_rows(source[: self.length], target[: self.length])

    def past(self) -> dict[str, Array]:
        """Return views (P, G, H, K)."""
        views = (buffer[: self.length] for buffer in self._buffers)
        return dict(zip(self._names("past"), views, strict=True))

    def new(self, num_tokens: int) -> dict[str, Array]:
        """Return views (L, G, H, K)."""
        views = (buffer[self.length : self.length + num_tokens] for buffer in self._buffers)
        return dict(zip(self._names("new"), views, strict=True))


def past_spans(num_tokens: int) -> tuple[int, ...]:
    """Return the lengths to which layout "fixed" pads the past of a cache of `num_tokens`.

    They are four, or fewer in a small cache, and multiples of 16; the last one is the whole cache.
    """
    span = 16 * max(1, -(-num_tokens // (16 * _NUM_SPANS)))
    return tuple(range(span, num_tokens + span, span))


class FixedArena(DeltaArena):
    """As `DeltaArena`, with the past padded to the end of its span, so that its sizes are few.

    A stage leaves the padding out by the number of cached tokens, which it gets as an input. The
    padding is finite: zeros, or what an earlier batch left.
    """

    def __init__(self, shape: KVShape, memory: Memory) -> None:
        self._spans = past_spans(shape.num_tokens)
        super().__init__(replace(shape, num_tokens=self._spans[-1]), memory)

    def _allocate(self, memory: Memory) -> list[Array]:
        buffers = super()._allocate(memory)
        for buffer in buffers:
            memory.fill_with_zeros(buffer)
        return buffers

    def past(self) -> dict[str, Array]:
        """Return views (P, G, H, K), P being the end of the span."""
        end = next(end for end in self._spans if end >= self.length)
        return dict(zip(self._names("past"), (b[:end] for b in self._buffers), strict=True))


class PresentArena(KVArena):
    """Two flat buffers per tensor, each a packed (G, H, P, K).

    The operator reads the past from one buffer and writes past and new tokens into the other.
    """

    def __init__(self, shape: KVShape, memory: Memory) -> None:
        super().__init__(shape)
        size = shape.num_tokens * shape.rows * shape.num_heads * shape.head_width
        count = 2 * shape.num_layers
        self._pair = [
            [memory.allocate((size,), shape.dtype) for _ in range(count)] for _ in range(2)
        ]
        self._current = 0

    def clear(self) -> None:
        """Start again, with all rows and nothing cached."""
        super().clear()
        self._current = 0

    def keep_rows(self, rows: int) -> None:
        """Keep only the first `rows` rows; the packed buffers begin with them."""
        self.shape = replace(self.shape, rows=rows)

    def past(self) -> dict[str, Array]:
        """Return packed views (G, H, P, K) of the current buffers."""
        return self._views("past", self._current, self.length)

    def new(self, num_tokens: int) -> dict[str, Array]:
        """Return packed views (G, H, P + L, K) of the other buffers."""
        return self._views("new", 1 - self._current, self.length + num_tokens)

    def advance(self, num_tokens: int) -> None:
        """Count the new tokens as cached and swap the buffers."""
        super().advance(num_tokens)
        self._current = 1 - self._current

    def _views(self, prefix: str, which: int, length: int) -> dict[str, Array]:
        kv = self.shape
        packed = (kv.rows, kv.num_heads, length, kv.head_width)
        size = kv.rows * kv.num_heads * length * kv.head_width
        views = (buffer[:size].reshape(packed) for buffer in self._pair[which])
        return dict(zip(self._names(prefix), views, strict=True))


class InPlaceArena(KVArena):
    """Head-major (G, H, S, K) buffers of all tokens, which a stage reads and writes in one call.

    `past` and `new` are the same arrays. A stage knows from an input how many tokens are cached.
    What lies behind them is finite: zeros, or what an earlier batch left.
    """

    def __init__(self, shape: KVShape, memory: Memory) -> None:
        super().__init__(shape)
        whole = (shape.rows, shape.num_heads, shape.num_tokens, shape.head_width)
        self._buffers = [memory.allocate(whole, shape.dtype) for _ in range(2 * shape.num_layers)]
        for buffer in self._buffers:
            memory.fill_with_zeros(buffer)

    def keep_rows(self, rows: int) -> None:
        """Keep only the first `rows` rows, which are the first part of every buffer."""
        self.shape = replace(self.shape, rows=rows)

    def past(self) -> dict[str, Array]:
        """Return the buffers (G, H, S, K) of the rows that are kept."""
        return self._views("past")

    def new(self, num_tokens: int) -> dict[str, Array]:
        """Return the same as `past`."""
        return self._views("new")

    def _views(self, prefix: str) -> dict[str, Array]:
        views = (buffer[: self.shape.rows] for buffer in self._buffers)
        return dict(zip(self._names(prefix), views, strict=True))


ARENAS: dict[str, Callable[[KVShape, Memory], KVArena]] = {
    "delta": DeltaArena,
    "fixed": FixedArena,
    "in_place": InPlaceArena,
    "present": PresentArena,
}
