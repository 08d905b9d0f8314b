"""The parts that tables, plots and parity tell of: from the steps that any family's loop yields.

A part ends where there is a picture to be decoded, so that a model that draws every token by itself
has a line per row of its picture, and not one per token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nsp.benchmarks.contest.clocked import StageCall
from nsp.benchmarks.record.result import Cost, Part
from nsp.family.order import Unit
from nsp.stage.io import Sizes

MAX_PARTS = 32  # lines that one still reads; more steps are joined
_WORDS: dict[Unit, str] = {
    "scale": "scale",
    "row": "row",
    "tokens": "token",
    "timestep": "timestep",
}
Grids = Sequence[tuple[int, int]]
Count = Callable[[str, Sizes], Cost | None]  # stage, sizes of one call -> its work


@dataclass(frozen=True)
class Group:
    """Steps that belong together; numbers count from 0."""

    name: str
    unit: Unit
    start: int
    stop: int


@dataclass(frozen=True)
class Played:
    """One batch with a clock on it: the calls before the loop, of every step, and after it."""

    before: Sequence[StageCall]
    steps: Sequence[Sequence[StageCall]]
    after: Sequence[StageCall]
    groups: Sequence[Group]

    @property
    def calls(self) -> list[StageCall]:
        """All calls in order."""
        return [*self.before, *(call for calls in self.steps for call in calls), *self.after]


def group_steps(steps: Sequence[tuple[Unit, bool]], grids: Grids) -> list[Group]:
    """Return the parts of a loop whose steps have a unit each, and may end with a picture.

    Scales are named after their grids, where there is a grid for each.
    """
    ends = [number + 1 for number, (_, is_picture) in enumerate(steps) if is_picture]
    if not ends or ends[-1] != len(steps):
        ends.append(len(steps))
    if len(ends) > MAX_PARTS:
        joined = math.ceil(len(ends) / MAX_PARTS)
        ends = [*ends[joined - 1 : -1 : joined], ends[-1]]
    found, start = [], 0
    for stop in ends:
        unit = steps[start][0]
        name = _name(unit, start, stop)
        if unit == "scale" and len(grids) == len(steps) == len(ends):
            name = f"{grids[start][0]}x{grids[start][1]}"
        found.append(Group(name, unit, start, stop))
        start = stop
    return found


def _name(unit: Unit, start: int, stop: int) -> str:
    word = _WORDS[unit]
    return f"{word} {stop}" if stop - start == 1 else f"{word}s {start + 1} to {stop}"


def parts(played: Played, count: Count) -> Iterator[Part]:
    """Yield every part in order, with the calls of stages that it takes and their work."""
    seen: dict[str, int] = {}

    def part(name: str, unit: str | None, calls: Sequence[StageCall]) -> Part:
        places: dict[str, tuple[int, int]] = {}
        costs: dict[str, Cost] = {}
        unknown = set()
        for call in calls:
            place = seen.get(call.stage, 0)
            seen[call.stage] = place + 1
            places[call.stage] = (places.get(call.stage, (place, 0))[0], place + 1)
            if (cost := count(call.stage, call.sizes)) is None:
                unknown.add(call.stage)
            else:
                costs[call.stage] = costs[call.stage] + cost if call.stage in costs else cost
        known = {stage: cost for stage, cost in costs.items() if stage not in unknown}
        return Part(name=name, unit=unit, calls=places, costs=known)

    for stage in dict.fromkeys(call.stage for call in played.before):
        yield part(stage, None, [call for call in played.before if call.stage == stage])
    for group in played.groups:
        steps = played.steps[group.start : group.stop]
        yield part(group.name, group.unit, [call for calls in steps for call in calls])
    for stage in dict.fromkeys(call.stage for call in played.after):
        yield part(stage, None, [call for call in played.after if call.stage == stage])
