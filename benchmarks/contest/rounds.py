"""Times of stages and whole images, observed in interleaved rounds.

Every round runs each contestant once, in an order that turns from round to round, so that what
slows the machine for a while slows all of them. Raw observations are kept; percentiles are computed
from them afterwards.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nsp.config import Config
from nsp.pipeline.encoding import PromptEncoder
from nsp.pipeline.pipeline import Pipeline
from nsp.stage.arena import Array, KVArena, KVShape
from nsp.stage.backend import Backend
from nsp.stage.io import Shape

# Worker threads of one runtime spin for a moment after its last operator; without a pause they
# would take the processor from the contestant that follows.
PAUSE_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Percentiles(Config):
    """Distribution of one duration, in ms."""

    count: int
    min: float
    p10: float
    p50: float
    p90: float
    p99: float
    max: float

    @property
    def spread(self) -> float:
        """Width from p10 to p90 over the median: how unsteady the machine was."""
        return (self.p90 - self.p10) / self.p50 if self.p50 else 0.0


def percentiles(values_ms: Sequence[float]) -> Percentiles:
    """Return the percentiles of one or more durations, interpolated linearly."""
    p10, p50, p90, p99 = (float(p) for p in np.percentile(values_ms, (10, 50, 90, 99)))
    return Percentiles(
        count=len(values_ms),
        min=float(min(values_ms)),
        p10=p10,
        p50=p50,
        p90=p90,
        p99=p99,
        max=float(max(values_ms)),
    )


@dataclass(frozen=True, kw_only=True)
class Observation(Config):
    """One batch of images by one contestant."""

    contestant: str
    round: int  # below 0: warm-up
    place: int  # in the round, from 0
    wall_ms: float  # from the prompts to the uint8 images
    stage_ms: dict[str, tuple[float, ...]]  # every call of every stage, in order

    @property
    def warmup(self) -> bool:
        """Whether it is kept out of the statistics."""
        return self.round < 0

    def stage_total_ms(self, stage: str) -> float:
        """Return the time of all calls of a stage."""
        return sum(self.stage_ms.get(stage, ()))

    @property
    def outside_ms(self) -> float:
        """Time outside the stages: the loop, tokenizer, uploads and downloads."""
        return self.wall_ms - sum(self.stage_total_ms(stage) for stage in self.stage_ms)


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


class Contestant:
    """A pipeline under measurement. `name` is what observations and tables call it."""

    def __init__(self, name: str, pipeline: Pipeline) -> None:
        self.name = name
        self._calls: list[StageCall] = []
        self._timed = TimedBackend(pipeline.backend, self._calls.append)
        self._pipeline = with_backend(pipeline, self._timed)

    def _generate(self, request: Mapping[str, Any]) -> None:
        """Generate once, from prompts that have not been read before."""
        if self._pipeline.prompts is not None:
            self._pipeline.prompts.forget()
        self._pipeline.generate(**request)

    def observe(self, request: Mapping[str, Any], *, number: int, place: int) -> Observation:
        """Return the times of one `generate` call."""
        self._calls.clear()
        start = time.perf_counter()
        self._generate(request)
        wall_ms = 1e3 * (time.perf_counter() - start)
        stage_ms: dict[str, tuple[float, ...]] = defaultdict(tuple)
        for call in self._calls:
            stage_ms[call.stage] += (round(call.ms, 4),)
        return Observation(
            contestant=self.name,
            round=number,
            place=place,
            wall_ms=round(wall_ms, 4),
            stage_ms=dict(stage_ms),
        )

    def stage_calls(self, request: Mapping[str, Any]) -> list[StageCall]:
        """Return all stage calls of one `generate` with the sizes of their axes."""
        self._calls.clear()
        self._timed.with_sizes = True
        try:
            self._generate(request)
        finally:
            self._timed.with_sizes = False
        return list(self._calls)


class Timed(Protocol):
    """What takes part in a round: a pipeline in this process, or a program in its own."""

    name: str

    def observe(self, request: Mapping[str, Any], *, number: int, place: int) -> Observation:
        """Return the times of one batch of images."""


@dataclass(frozen=True, kw_only=True)
class Stability:
    """When a measurement may end early: no median moved by more than this over the last rounds."""

    window: int  # rounds
    tolerance: float  # of the median

    def reached(self, observations: Sequence[Observation]) -> bool:
        """Return whether every contestant's median is that of `window` rounds ago."""
        walls: dict[str, list[float]] = defaultdict(list)
        for each in observations:
            if not each.warmup:
                walls[each.contestant].append(each.wall_ms)
        return bool(walls) and all(map(self._stands, walls.values()))

    def _stands(self, walls: list[float]) -> bool:
        if len(walls) < 2 * self.window:
            return False
        before, now = np.median(walls[: -self.window]), np.median(walls)
        return bool(abs(now - before) <= self.tolerance * before)


def interleaved(
    contestants: Sequence[Timed],
    request: Mapping[str, Any],
    *,
    rounds: int,
    warmup: int,
    min_rounds: int = 3,
    max_seconds: float = float("inf"),
    stability: Stability | None = None,
    pause_s: float = PAUSE_S,
) -> Iterator[Observation]:
    """Yield observations of `warmup` rounds, then of at most `rounds` measured ones.

    The first contestant leads in even rounds, the last in odd ones. No further round starts after
    `max_seconds` or once `stability` is reached, but for the first `min_rounds`.
    """
    start, seen = time.perf_counter(), list[Observation]()
    for number in range(-warmup, rounds):
        if number >= min_rounds:
            late = time.perf_counter() - start > max_seconds
            if late or (stability is not None and stability.reached(seen)):
                return
        order = contestants if number % 2 == 0 else contestants[::-1]
        for place, contestant in enumerate(order):
            time.sleep(pause_s)
            seen.append(contestant.observe(request, number=number, place=place))
            yield seen[-1]
