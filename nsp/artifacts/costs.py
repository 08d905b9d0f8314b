"""What the calls of a model's stages cost: operations and bytes, counted at export; no torch.

`nsp.artifacts.counting` counts them and the manifest keeps them. Counted are matrix products,
convolutions and attention, a multiply-add as two operations; element-wise work and lookups in
tables are not. An image's work does not depend on its batch, so operations are a constant and so
many for each image (B), row (G), encoded prompt (N) and rank (R).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from nsp.artifacts.weight_kinds import WeightCounts
from nsp.config import Config
from nsp.errors import ConfigError
from nsp.stage.arena import ARENAS, Array, HostArrays, KVShape, is_cached
from nsp.stage.io import Shape, Sizes, StageIO, array_bytes

if TYPE_CHECKING:
    from nsp.artifacts.manifest import Manifest

ROWS = ("B", "G", "N", "R")  # the axes that every family has; all others are the family's own
FIXED = ""  # key of the operations that no number of rows changes


@dataclass(frozen=True, kw_only=True)
class SpanCosts(Config):
    """The operations of a stage's calls at one of its spans.

    A span gives some of the family's axes one size, others a range. Each axis has the sizes at
    which operations were counted: one, or up to three of a range. Between these they are at most
    quadratic in every axis (attention), so that interpolation is exact.
    """

    axes: dict[str, tuple[int, ...]]
    # Constant part and the part of each axis of rows; one number for each combination of sizes of
    # `axes`, the last axis changing fastest.
    flop: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        """Check that there is a number for each combination."""
        count = math.prod(len(sizes) for sizes in self.axes.values())
        if any(len(numbers) != count for numbers in self.flop.values()):
            raise ConfigError(f"costs: a span of {self.axes} needs {count} numbers for each axis")

    def covers(self, sizes: Sizes) -> bool:
        """Return whether a call of these sizes is within the span."""
        return all(
            name in sizes and min(counted) <= sizes[name] <= max(counted)
            for name, counted in self.axes.items()
        )

    def operations(self, sizes: Sizes) -> int:
        """Return the operations of a call of these sizes."""
        weights = [_lagrange(counted, sizes[name]) for name, counted in self.axes.items()]
        shares = [math.prod(factors) for factors in product(*weights)]
        per_row = {
            axis: sum(share * number for share, number in zip(shares, numbers, strict=True))
            for axis, numbers in self.flop.items()
        }
        return round(sum(n * (1 if a == FIXED else sizes[a]) for a, n in per_row.items()))


def _lagrange(counted: tuple[int, ...], size: int) -> list[float]:
    """Return the share of each counted size in the value at `size`."""
    return [
        math.prod((size - other) / (each - other) for other in counted if other != each)
        for each in counted
    ]


@dataclass(frozen=True, kw_only=True)
class StageCosts(Config):
    """Weights and operations of one stage."""

    weights: WeightCounts
    tables: WeightCounts  # those of `weights` that are only looked up, row by row
    spans: tuple[SpanCosts, ...]
    # Bytes alive at once in a call, beside inputs and outputs: float32, the widest span, one image
    # with guidance. Of more images it is at most so many times as much.
    scratch: int = 0

    def flop(self, sizes: Sizes) -> int | None:
        """Return the operations of one call; None for sizes that no span covers."""
        found = next((span for span in self.spans if span.covers(sizes)), None)
        return None if found is None else found.operations(sizes)

    def weight_bytes(self, precision: str) -> int:
        """Return the bytes of all weights."""
        return self.weights.num_bytes(precision)

    def read_bytes(self, precision: str) -> int:
        """Return the bytes of the weights that every call reads: all but tables."""
        return self.weight_bytes(precision) - self.tables.num_bytes(precision)


@dataclass(frozen=True)
class CallCost:
    """The work of one stage call."""

    flop: int = 0
    weight_bytes: int = 0  # of weights that must be read
    io_bytes: int = 0  # of inputs and outputs

    @property
    def num_bytes(self) -> int:
        """The bytes that must be moved at least."""
        return self.weight_bytes + self.io_bytes


def read_costs(manifest: "Manifest") -> Mapping[str, StageCosts]:
    """Return the costs of every stage; empty for engines exported before costs were counted.

    They are checked here and not when a manifest is read, which `nsp generate` waits for. Raises
    ConfigError for costs that are not as an export writes them.
    """
    return {stage: StageCosts.from_dict(values) for stage, values in manifest.costs.items()}


def arena_bytes(kv_layout: str, shape: KVShape) -> int:
    """Return what the cache of one batch allocates."""
    counter = _Allocated()
    ARENAS[kv_layout](shape, counter)
    return counter.total


class _Allocated(HostArrays):
    """Memory that is counted; what is allocated is never written, and so takes no room."""

    total = 0

    def allocate(self, shape: Shape, dtype: str) -> NDArray[Any]:
        """Return uninitialised memory."""
        self.total += array_bytes(shape, dtype)
        # NumPy has no bfloat16, and nothing is written.
        return super().allocate(shape, "float16" if dtype == "bfloat16" else dtype)

    def fill_with_zeros(self, array: Array) -> None:
        """Leave an array as it is."""


def call_cost(costs: StageCosts, io: StageIO, sizes: Sizes, precision: str) -> CallCost | None:
    """Return the cost of one call of a stage; None for sizes that were not counted.

    In layout "in_place" the past's length is no size of a call: it counts with half of the cache,
    so that the sum over a picture is right.
    """
    halves = {
        name: counted[len(counted) // 2]
        for span in costs.spans
        for name, counted in span.axes.items()
        if name not in io.free_axes
    }
    flop = costs.flop({**halves, **sizes})
    if flop is None:
        return None
    moved = 0
    for name, spec in (*io.inputs.items(), *io.outputs.items()):
        num_bytes = array_bytes(spec.shape(sizes), spec.dtype)
        if is_cached(name) and _is_in_place(io, name):
            num_bytes = num_bytes // 2 if name in io.inputs else 0
        moved += num_bytes
    return CallCost(flop, costs.read_bytes(precision), moved)


def _is_in_place(io: StageIO, name: str) -> bool:
    """Return whether a tensor of the cache is the whole cache, read and written in place."""
    _, _, rest = name.partition("_")
    past, new = io.inputs.get(f"past_{rest}"), io.outputs.get(f"new_{rest}")
    return past is not None and past == new
