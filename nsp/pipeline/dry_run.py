"""What generating one batch takes, from a run of the real loop on tensors without content (torch).

Only shapes are computed, so a model that does not fit this machine is counted in seconds. Memory is
that of the tensors that are alive at once: keys and values, what stages hand to one another, and
what the running stage needs. Outputs that a stage writes into the arena count there alone, because
engines write them in place.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from nsp.artifacts.counting import Watch, operation_counter
from nsp.backends.torch import TorchBackend
from nsp.family.contract import AnyFamily
from nsp.family.order import Order
from nsp.family.system import System
from nsp.pipeline.pipeline import Pipeline
from nsp.stage.backend import Backend
from nsp.stage.io import Shape, Sizes, StageIO, array_bytes


@dataclass(frozen=True)
class StageCall:
    """One call of a stage."""

    stage: str
    sizes: Sizes
    flop: int
    io_bytes: int  # of inputs and outputs


@dataclass(frozen=True)
class DryRun:
    """What one batch takes."""

    calls: Sequence[StageCall]
    read: Mapping[str, frozenset[str]]  # stage -> names of the weights it reads, without tables
    arena_bytes: int
    scratch_bytes: int  # beside weights and arena, at the widest moment

    @property
    def flop(self) -> int:
        """All operations."""
        return sum(call.flop for call in self.calls)


def generate_dry(
    family: AnyFamily,
    system: System,
    orders: Sequence[Order[Any]],
    *,
    kv_layout: str,
    kv_dtype: str = "float32",
    mode: FakeTensorMode | None = None,
) -> DryRun:
    """Return what a batch of `orders` takes, in the precision of the weights of `system`.

    `mode` is that in which the system was built without content. A system with content is run as
    it is, without a mode: then the numbers are measured.
    """
    declared = family.stages_io(system.config, kv_layout=kv_layout, dtype=kv_dtype)
    weights = dict(system.named_parameters())
    watch = Watch(weights)
    with mode or nullcontext(), torch.no_grad():
        modules = family.learner.modules(system, kv_layout)
        backend = _CountingBackend(modules, declared, kv_layout=kv_layout, watch=watch)
        pipeline = Pipeline(family, system.config, backend, tokenizer=system.prompt_tokenizer)
        with watch:
            pipeline.images(orders)
    read = {stage: frozenset(names) for stage, names in backend.read.items()}
    return DryRun(backend.calls, read, backend.arena_bytes, watch.peak_bytes())


class _CountingBackend(TorchBackend):
    """Runs the stage modules, counts, and needs no content."""

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        stages_io: Mapping[str, StageIO],
        *,
        kv_layout: str,
        watch: Watch[str],
    ) -> None:
        Backend.__init__(self, stages_io)  # torch's own would move the weights to a device
        self.kv_layout, self.device, self._stages = kv_layout, torch.device("cpu"), dict(stages)
        self.watch = watch
        self.calls: list[StageCall] = []
        self._seen: dict[object, tuple[StageCall, dict[str, tuple[Shape, torch.dtype]]]] = {}
        self.read: dict[str, set[str]] = {}
        self.arena_bytes = 0

    def run(
        self, stage: str, feeds: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return all outputs, as the backend does."""
        io = self.stages_io[stage]
        sizes = io.check(feeds, stage)
        key = (stage, *sizes.items())
        if key in self._seen:  # without content, nothing but its outputs' shapes matters
            call, shapes = self._seen[key]
            self.calls.append(call)
            given = outputs or {}
            made = {n: torch.empty(s, dtype=d) for n, (s, d) in shapes.items() if n not in given}
            return {**made, **given}
        self.watch.read.clear()
        with operation_counter() as counter:
            results = self._stages[stage](*(feeds[name] for name in io.inputs))
        self.read.setdefault(stage, set()).update(self.watch.read)
        tensors = (*io.inputs.values(), *io.outputs.values())
        io_bytes = sum(array_bytes(spec.shape(sizes), spec.dtype) for spec in tensors)
        self.calls.append(StageCall(stage, sizes, int(counter.get_total_flops()), io_bytes))
        named = dict(zip(io.outputs, results, strict=True))
        for name, target in (outputs or {}).items():
            self.watch.leave_out(named[name])
            named[name] = target
        if any(isinstance(each, FakeTensor) for each in named.values()):
            shapes = {name: (each.shape, each.dtype) for name, each in named.items()}
            self._seen[key] = self.calls[-1], shapes
        return named

    def allocate(self, shape: Shape, dtype: str) -> Tensor:
        """Return uninitialised memory, which belongs to the arena."""
        found = super().allocate(shape, dtype)
        self.arena_bytes += found.untyped_storage().nbytes()
        self.watch.leave_out(found)
        return found

    def download(self, array: Any) -> NDArray[Any]:
        """Return zeros for a tensor without content, otherwise a copy."""
        if isinstance(array, FakeTensor):
            return np.zeros(tuple(array.shape), str(array.dtype).removeprefix("torch."))
        return super().download(array)
