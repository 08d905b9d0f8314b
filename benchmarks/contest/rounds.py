"""Times of stages and whole images, observed in interleaved rounds.

Every round runs each contender once, in an order that turns from round to round, so that what slows
the machine for a while slows all of them. Raw observations are kept; percentiles are computed from
them afterwards.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from nsp.benchmarks.ceilings.clock import Clock
from nsp.benchmarks.contest.clocked import StageCall, TimedBackend, with_backend
from nsp.benchmarks.contest.steps import Played, group_steps
from nsp.benchmarks.record.times import Observation
from nsp.family.order import Order
from nsp.pipeline.orders import make_orders
from nsp.pipeline.pipeline import Pipeline

# Worker threads of one runtime spin for a moment after its last operator; without a pause they
# would take the processor from the contender that follows.
PAUSE_S = 0.02


class Runner:
    """A loaded contender under measurement; its name is what observations and tables call it."""

    def __init__(self, name: str, pipeline: Pipeline, *, device: str = "cpu") -> None:
        self.name, self._clock = name, Clock(device)
        self._calls: list[StageCall] = []
        self._timed = TimedBackend(pipeline.backend, self._calls.append)
        self._watched = with_backend(pipeline, self._timed)
        # A clock on every call would undo a recording, and would make a GPU wait after each stage.
        unwatched = pipeline.backend.records or device != "cpu"
        self._pipeline = pipeline if unwatched else self._watched

    def observe(self, request: Mapping[str, Any], *, number: int, place: int) -> Observation:
        """Return the times of one `generate` call, from prompts that have not been read before."""
        self._calls.clear()
        self._forget()
        wall_ms = self._clock.ms(partial(self._pipeline.generate, **request))
        stage_ms: dict[str, tuple[float, ...]] = defaultdict(tuple)
        for call in self._calls:
            stage_ms[call.stage] += (round(call.ms, 4),)
        observed = Observation(
            contender=self.name,
            round=number,
            place=place,
            wall_ms=round(wall_ms, 4),
            stage_ms=dict(stage_ms),
        )
        if self._pipeline is self._watched:
            return observed
        self._forget()
        loop_ms = self._clock.ms(lambda: [*self._pipeline.stream(**request)])
        return replace(observed, loop_ms=round(loop_ms, 4))

    def play(self, request: Mapping[str, Any]) -> Played:
        """Return the calls of stages of one batch, step by step, with the sizes of their axes."""
        pipeline = self._watched
        self._forget()
        self._timed.with_sizes = True
        try:
            self._calls.clear()
            steps = pipeline.run(orders_of(pipeline, request))
            before, kinds, calls, latent = self._taken(), [], [], None
            for step in steps:
                latent = step.latent
                kinds.append((step.unit, latent is not None))
                calls.append(self._taken())
            assert latent is not None  # the last step ends with a picture
            pipeline.decode(latent)
            groups = group_steps(kinds, pipeline.family.grids(pipeline.config))
            return Played(before, calls, self._taken(), groups)
        finally:
            self._timed.with_sizes = False

    def _taken(self) -> list[StageCall]:
        """Return the calls since the last time."""
        found = list(self._calls)
        self._calls.clear()
        return found

    def _forget(self) -> None:
        """Let prompts be read again."""
        for pipeline in (self._pipeline, self._watched):
            if pipeline.prompts is not None:
                pipeline.prompts.forget()


def orders_of(pipeline: Pipeline, request: Mapping[str, Any]) -> list[Order[Any]]:
    """Return the orders that `generate` makes of a request."""
    return make_orders(pipeline.sampling, **request)


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
        """Return whether every contender's median is that of `window` rounds ago."""
        walls: dict[str, list[float]] = defaultdict(list)
        for each in observations:
            if not each.warmup:
                walls[each.contender].append(each.wall_ms)
        return bool(walls) and all(map(self._stands, walls.values()))

    def _stands(self, walls: list[float]) -> bool:
        if len(walls) < 2 * self.window:
            return False
        before, now = np.median(walls[: -self.window]), np.median(walls)
        return bool(abs(now - before) <= self.tolerance * before)


def interleaved(
    contenders: Sequence[Timed],
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

    The first contender leads in even rounds, the last in odd ones. No further round starts after
    `max_seconds` or once `stability` is reached, but for the first `min_rounds`.
    """
    start, seen = time.perf_counter(), list[Observation]()
    for number in range(-warmup, rounds):
        if number >= min_rounds:
            late = time.perf_counter() - start > max_seconds
            if late or (stability is not None and stability.reached(seen)):
                return
        order = contenders if number % 2 == 0 else contenders[::-1]
        for place, contender in enumerate(order):
            time.sleep(pause_s)
            seen.append(contender.observe(request, number=number, place=place))
            yield seen[-1]
