"""A clock on a pipeline: another backend that tells how long every call of a stage took."""

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from nsp.pipeline.encoding import PromptEncoder
from nsp.pipeline.pipeline import Pipeline
from nsp.stage.arena import Array, KVArena, KVShape
from nsp.stage.backend import Backend
from nsp.stage.io import Shape


@dataclass(frozen=True)
class StageCall:
    """One run of a stage: how long it took and the sizes of its free axes (when asked for)."""

    stage: str
    ms: float
    sizes: Mapping[str, int]


class TimedBackend(Backend):
    """Another backend with a clock on `run`; `on_call` gets every call after it was timed."""

    name = "timed"

    def __init__(self, inner: Backend, on_call: Callable[[StageCall], None]) -> None:
        super().__init__(inner.stages_io)
        self.inner, self.kv_layout, self.on_call = inner, inner.kv_layout, on_call
        self.max_ranks, self.batch_sizes = inner.max_ranks, inner.batch_sizes
        self.with_sizes = False
        self._synchronize = synchronizer(inner)

    def run(
        self, stage: str, feeds: Mapping[str, Array], outputs: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Return the outputs of the inner backend; report the call to `on_call`."""
        start = time.perf_counter()
        results = self.inner.run(stage, feeds, outputs)
        self._synchronize()
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        sizes = self.stages_io[stage].check(feeds, stage) if self.with_sizes else {}
        self.on_call(StageCall(stage, elapsed_ms, sizes))
        return results

    def upload(self, array: NDArray[Any]) -> Array:
        """Return the inner backend's array."""
        return self.inner.upload(array)

    def download(self, array: Array) -> NDArray[Any]:
        """Return the inner backend's copy."""
        return self.inner.download(array)

    def allocate(self, shape: Shape, dtype: str) -> Array:
        """Return the inner backend's memory."""
        return self.inner.allocate(shape, dtype)

    def copy_rows(self, source: Array, target: Array) -> None:
        """Let the inner backend copy."""
        self.inner.copy_rows(source, target)

    def arena(self, shape: KVShape) -> AbstractContextManager[KVArena]:
        """Lend the inner backend's arena."""
        return self.inner.arena(shape)

    def kv_dtype(self) -> str:
        """Return the inner backend's dtype of keys and values."""
        return self.inner.kv_dtype()

    def scalar(self, value: float, dtype: str = "float32") -> Array:
        """Return the inner backend's scalar."""
        return self.inner.scalar(value, dtype)


def synchronizer(backend: Backend) -> Callable[[], None]:
    """Return what waits for the device of `backend`; nothing where `run` returns finished."""
    if getattr(getattr(backend, "device", None), "type", "cpu") == "cuda":
        import torch

        return torch.cuda.synchronize
    return lambda: None


def with_backend(pipeline: Pipeline, backend: Backend) -> Pipeline:
    """Return a copy of `pipeline` that runs on `backend`."""
    result = copy.copy(pipeline)
    result.backend, result.origin = backend, None
    if pipeline.tokenizer is not None:
        result.prompts = PromptEncoder(pipeline.tokenizer, backend, max_batch=pipeline.max_batch)
    return result
