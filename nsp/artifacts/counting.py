"""Counts what a model's stages cost, on tensors without content (torch).

torch's FlopCounterMode counts the operations. It has no formula for ONNX's attention operator and
for the fused attention of CPUs, which would count as nothing: the first gets one here, and the
second is computed as two products instead. Only shapes are computed, so a model of any size is
counted in seconds.
"""

import copy
import logging
import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any, Generic, TypeVar

import torch
import torch.onnx.ops  # registers ONNX's operators
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nsp.artifacts.costs import FIXED, ROWS, SpanCosts, StageCosts
from nsp.artifacts.weight_kinds import count_weights
from nsp.family.contract import AnyFamily, Stage
from nsp.family.system import System
from nsp.stage.io import Sizes, StageIO

M = TypeVar("M", bound=nn.Module)
K = TypeVar("K", bound=Hashable)  # what a weight is remembered by

logger = logging.getLogger(__name__)

# Rows to count with: never 0 or 1, which some operators treat in another way, and G not below B.
_FEW: Sizes = {"B": 2, "G": 4, "N": 2, "R": 2}
_MORE: Sizes = {"B": 3, "G": 7, "N": 4, "R": 5}
_LOOKUPS = {
    torch.ops.aten.embedding.default,
    torch.ops.aten.index_select.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.gather.default,
}


def count_costs(family: AnyFamily, system: System[Any]) -> dict[str, StageCosts]:
    """Return the costs of every stage of a model; one that cannot be counted is left out.

    They do not depend on the layout of the cache; stages that only one layout has are included.
    """
    found: dict[str, StageCosts] = {}
    names = {id(parameter): name for name, parameter in system.named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in system.state_dict().items()}
    for layout in family.kv_layouts:
        stages = family.stages(system.config, kv_layout=layout, dtype="float32")
        modules = family.learner.modules(system, layout)
        for name, stage in stages.items():
            if name in found:
                continue
            with counting() as counter:
                spans = _count_spans(name, counter, modules[name], stage)
                scratch = counter.scratch(modules[name], stage.io, _widest(stage))
            looked_up = {names[each] for each in counter.looked_up - counter.read if each in names}
            tables = {each: shapes[each] for each in looked_up}
            if spans is not None:
                found[name] = StageCosts(
                    weights=count_weights(stage, shapes),
                    tables=count_weights(stage, tables),
                    spans=spans,
                    scratch=scratch,
                )
    return found


def _count_spans(
    name: str, counter: "Counter", module: nn.Module, stage: Stage
) -> tuple[SpanCosts, ...] | None:
    """Return the operations at every span; None, with a warning, where they are not linear."""
    io = stage.io
    rows = [axis for axis in ROWS if axis in io.free_axes]
    last = {
        axis: ends if isinstance(ends, int) else ends[1] for axis, ends in stage.spans[-1].items()
    }
    largest = {**_MORE, **last}
    expected = counter.flop(module, io, largest, watched=True)
    found = []
    for span in stage.spans:
        axes = {a: _counted_sizes(ends) for a, ends in span.items() if a in io.free_axes}
        flop: dict[str, list[int]] = {axis: [] for axis in (FIXED, *rows)}
        for own in product(*axes.values()):
            sizes = {**_FEW, **dict(zip(axes, own, strict=True))}
            few = counter.flop(module, io, sizes) if expected else 0
            fixed = few
            for axis in rows:
                more = counter.flop(module, io, {**sizes, axis: _MORE[axis]}) if few else 0
                each = (more - few) // (_MORE[axis] - _FEW[axis])
                flop[axis].append(each)
                fixed -= each * _FEW[axis]
            flop[FIXED].append(fixed)
        counts = {axis: tuple(each) for axis, each in flop.items() if any(each)}
        found.append(SpanCosts(axes=axes, flop=counts))
    if found[-1].operations(largest) != expected:
        logger.warning(
            "%s: its operations are not so many for each row: they are not counted", name
        )
        return None
    return tuple(found)


def _widest(stage: Stage) -> Sizes:
    """Return the sizes of a guided image's call at the span whose tensors are the largest."""
    found = [
        {"B": 1, "G": 2, "N": 1, "R": 1}
        | {axis: ends if isinstance(ends, int) else ends[1] for axis, ends in span.items()}
        for span in stage.spans
    ]
    tensors = (*stage.io.inputs.values(), *stage.io.outputs.values())
    return max(found, key=lambda each: sum(math.prod(spec.shape(each)) for spec in tensors))


def _counted_sizes(ends: int | tuple[int, int]) -> tuple[int, ...]:
    """Return the sizes of an axis to count at: both ends of a range and its middle."""
    if isinstance(ends, int):
        return (ends,)
    return tuple(sorted({ends[0], sum(ends) // 2, ends[1]}))


class Counter:
    """Runs stage modules on tensors without content, and counts."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self.looked_up: set[int] = set()  # ids of weights of which something takes rows
        self.read: set[int] = set()  # ids of weights of which something reads all

    def flop(self, module: nn.Module, io: StageIO, sizes: Sizes, *, watched: bool = False) -> int:
        """Return the operations of one call; note which weights it reads if it is `watched`."""
        call, watch = self._watched(module)
        counter = operation_counter()
        with counter, watch if watched else nullcontext():
            call(*_inputs(io, sizes))
        self.read |= watch.read
        self.looked_up |= watch.looked_up
        return int(counter.get_total_flops())

    def scratch(self, module: nn.Module, io: StageIO, sizes: Sizes) -> int:
        """Return the most bytes alive at once in one call, without its inputs and outputs."""
        call, watch = self._watched(module)
        inputs = _inputs(io, sizes)
        with watch:
            outputs = call(*inputs)
        watch.leave_out(*outputs)
        return watch.peak_bytes()

    def _watched(self, module: nn.Module) -> tuple[Callable[..., Sequence[Tensor]], "Watch[int]"]:
        """Return the module as a function whose weights have no content, and what watches it."""
        named = [*module.named_parameters(), *module.named_buffers()]
        empty = {name: self._without_content(tensor) for name, tensor in named}
        watch = Watch({id(tensor): empty[name] for name, tensor in named})
        return lambda *inputs: torch.func.functional_call(module, empty, inputs), watch

    def _without_content(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        return self._mode.from_tensor(tensor, static_shapes=True)


def emptied(module: M, mode: FakeTensorMode, dtypes: Mapping[str, torch.dtype] | None = None) -> M:
    """Return a copy of a module whose weights and buffers have no content.

    The module may be on the device "meta", on which some operators do not run. `dtypes` are those
    of some parameters.
    """
    chosen = dtypes or {}
    copies: dict[int, Tensor] = {}
    with mode:
        for name, each in module.named_parameters():
            empty = torch.empty(each.shape, dtype=chosen.get(name, each.dtype), device="cpu")
            copies[id(each)] = nn.Parameter(empty, requires_grad=each.requires_grad)
        for buffer in module.buffers():
            copies[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return copy.deepcopy(module, copies)


@contextmanager
def counting(mode: FakeTensorMode | None = None) -> Iterator[Counter]:
    """Yield a counter; until the block ends, no tensor that this thread makes has content.

    `mode` is that in which the model was built, if its weights have no content either.
    """
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield Counter(mode)


def operation_counter() -> FlopCounterMode:
    """Return torch's counter, with formulas for the attention operators that it does not know."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.onnx.Attention: _onnx_attention_flop,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
        },
    )


def _inputs(io: StageIO, sizes: Sizes) -> list[Tensor]:
    """Return the inputs of a call."""
    return [
        torch.zeros(spec.shape(sizes), dtype=getattr(torch, spec.dtype))
        for spec in io.inputs.values()
    ]


def _attention_flop(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **options: Any
) -> int:
    """Return the operations of attention on shapes (G, H, L, K)."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _onnx_attention_flop(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    mask: Sequence[int] | None = None,
    past_key: Sequence[int] | None = None,
    *_: Any,
    **options: Any,
) -> int:
    """Return the operations of ONNX's operator, whose cached keys (G, H, P, K) come before."""
    past = 0 if past_key is None else past_key[2]
    return _attention_flop(query, [*key[:2], past + key[2], key[3]], value)


class Watch(TorchDispatchMode, Generic[K]):
    """Notes which weights operators read, and when memory is taken and freed."""

    def __init__(self, weights: Mapping[K, Tensor]) -> None:
        """Watch `weights`, by any key to remember each by."""
        TorchDispatchMode.__init__(self)
        self._weights = {_storage(tensor): key for key, tensor in weights.items()}
        self.looked_up: set[K] = set()  # those of which something takes rows
        self.read: set[K] = set()  # those of which something reads all
        self._events: list[tuple[int, int]] = []  # number of the storage, bytes more or less
        self._numbers: dict[int, int] = {}  # of the storages that are alive
        self._left_out: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operator and note what it does."""
        result = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        known = {_storage(tensor) for tensor in given}
        if func.is_view and all(_storage(tensor) in known for tensor in made):
            return result
        for place, tensor in enumerate(given):
            weight = self._weights.get(_storage(tensor))
            if weight is not None:
                is_table = func in _LOOKUPS and place == 0
                (self.looked_up if is_table else self.read).add(weight)
        for tensor in made:
            self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        """Note a storage that was not there before, and its end."""
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key in self._numbers or key in self._weights:
            return
        number, size = len(self._events), storage.nbytes()
        self._numbers[key] = number
        self._events.append((number, size))

        def freed() -> None:
            del self._numbers[key]
            self._events.append((number, -size))

        weakref.finalize(storage, freed)

    def leave_out(self, *tensors: Tensor) -> None:
        """Do not count the memory of these tensors."""
        keys = map(_storage, tensors)
        self._left_out |= {self._numbers[key] for key in keys if key in self._numbers}

    def peak_bytes(self) -> int:
        """Return the most bytes that were alive at once."""
        alive = most = 0
        for number, size in self._events:
            if number not in self._left_out:
                alive += size
                most = max(most, alive)
        return most


def _storage(tensor: Tensor) -> int:
    """Return a number that tensors sharing memory have in common."""
    return int(tensor.untyped_storage()._cdata)
