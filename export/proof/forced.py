"""Repeats recorded calls of a stage with PyTorch's inputs (teacher forcing).

If only one stage uses the key/value cache, it fills its own, so that its errors accumulate as in
real use. If several stages share a cache, each gets PyTorch's, and its own additions are compared
too. For engines of one batch size, smaller batches are padded. This module needs no torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.export.proof.full_batches import (
    Arrays,
    cache_rows,
    full_rows,
    full_size,
    kept_rows,
    padded,
    take,
)
from nsp.export.proof.recorded import Call, Recording
from nsp.stage.arena import KVArena, is_cached
from nsp.stage.backend import Backend
from nsp.stage.io import Axes, StageIO


@dataclass(frozen=True)
class Repeated:
    """One recorded call and the outputs of the stage under test."""

    call: Call
    following: Call | None  # the next recorded call of any stage
    found: Arrays  # outputs of the stage under test, by the names that the call has


def repeat(stage: str, io: StageIO, backend: Backend, recording: Recording) -> Iterator[Repeated]:
    """Yield every recorded call of the stage that should be compared."""
    cache = _Cache(stage, io, backend, recording)
    followers = (*recording.calls[1:], None)
    for call, following in zip(recording.calls, followers, strict=True):
        if call.stage == stage and (call.is_compared or cache.is_own):
            rows = full_rows(backend, io, call.feeds)
            feeds: dict[str, Any] = {
                name: uploaded(backend, array, io.inputs[name])
                for name, array in take(call.feeds, io.inputs, rows).items()
            }
            given = cache.given(call)
            results = backend.run(stage, {**feeds, **cache.past()}, given)
            if call.is_compared:
                found = {n: cache.as_recorded(n, results[n], call) for n in call.outputs}
                yield Repeated(call, following, take(found, io.outputs, kept_rows(rows)))
        cache.advance(call)


class _Cache:
    """The cache of a stage under test, if it has one."""

    def __init__(self, stage: str, io: StageIO, backend: Backend, recording: Recording) -> None:
        self._stage, self._backend = stage, backend
        names = [*io.inputs, *io.outputs]
        specs = [{**io.inputs, **io.outputs}[name] for name in names if is_cached(name)]
        self.arena: KVArena | None = None
        self._is_full = full_size(backend) is not None  # whether all calls are padded
        if specs and recording.kv is not None:
            rows = cache_rows(backend, specs[0], recording.kv.rows)
            self.arena = backend.new_arena(replace(recording.kv, rows=rows, dtype=specs[0].dtype))
        self._reads = any(is_cached(name) for name in io.inputs)
        self._spec = Axes("", specs[0].dtype) if specs else Axes("")
        self.is_own = self.arena is not None and not recording.has_cache

    def given(self, call: Call) -> Mapping[str, Any]:
        """Return the buffers for the call's new keys and values."""
        if self.arena is None:
            return {}
        self._keep(call)
        return self.arena.new(call.num_new) if call.num_new else {}

    def past(self) -> Mapping[str, Any]:
        """Return the past that the stage reads."""
        return self.arena.past() if self.arena is not None and self._reads else {}

    def as_recorded(self, name: str, array: Any, call: Call) -> NDArray[Any]:
        """Return an output in its recorded form: only the new keys and values."""
        found = self._backend.download(array)
        if is_cached(name) and self._backend.kv_layout == "present":  # (G, H, P + L, K)
            return found[:, :, -call.num_new :].transpose(2, 0, 1, 3)
        if is_cached(name) and self._backend.kv_layout == "in_place":  # (G, H, S, K)
            return found[:, :, self._next(call)].transpose(2, 0, 1, 3)
        return found

    def advance(self, call: Call) -> None:
        """Add a call's new keys and values to the cache: the stage's own, or PyTorch's."""
        if self.arena is None or not call.num_new:
            return
        self._keep(call)
        if self.is_own and call.stage != self._stage:
            return
        if not self.is_own:
            self._force({n: array for n, array in call.outputs.items() if is_cached(n)}, call)
        self.arena.advance(call.num_new)

    def _keep(self, call: Call) -> None:
        """Remove null rows when guidance has ended; engines of one batch size keep all rows."""
        if self.arena is None or self._is_full:
            return
        if call.rows and call.rows < self.arena.shape.rows:
            self.arena.keep_rows(call.rows)

    def _next(self, call: Call) -> slice:
        """Return the place of a call's new tokens in the whole cache."""
        assert self.arena is not None
        return slice(self.arena.length, self.arena.length + call.num_new)

    def _force(self, recorded: Mapping[str, NDArray[Any]], call: Call) -> None:
        """Write recorded keys and values (L, G, H, K) as the next part of the cache."""
        assert self.arena is not None
        past = self.arena.past()
        for name, place in self.arena.new(call.num_new).items():
            new = padded(recorded[name], self.arena.shape.rows, 1)
            if self._backend.kv_layout == "present":
                before = self._backend.download(past[name.replace("new_", "past_", 1)])
                new = np.concatenate([before, new.transpose(1, 2, 0, 3)], axis=2)
            if self._backend.kv_layout == "in_place":
                whole = self._backend.download(place)
                whole[:, :, self._next(call)] = new.transpose(1, 2, 0, 3)
                new = whole
            self._backend.copy_rows(uploaded(self._backend, new, self._spec), place)


def uploaded(backend: Backend, array: NDArray[Any], spec: Axes) -> Any:
    """Return an array of the reference in the dtype of the stage's input."""
    if spec.dtype == "bfloat16":  # NumPy does not have it: the torch backend narrows the array
        import torch

        tensor: Any = backend.upload(array)
        return tensor.to(torch.bfloat16)
    return backend.upload(np.asarray(array, spec.dtype))
