"""PyTorch in the precision of the engines: eager, with CUDA graphs, and compiled, as backends.

All three run the stage modules of one model in the precision map of the export (no autocast): the
same weights, the same dtypes, the same loop. The faster two record what the loop does once and
repeat it as one CUDA graph, which is the most PyTorch offers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nsp.artifacts.manifest import PRECISION_DTYPES
from nsp.backends.torch import TorchBackend
from nsp.export.graph.narrow import at_precision
from nsp.family.contract import AnyFamily
from nsp.layers.attention import KeyValue
from nsp.pipeline.pipeline import Pipeline
from nsp.stage.arena import KVArena, KVShape
from nsp.stage.backend import Loop, T

_ALIGNMENT = 256  # bytes; what CUDA's own allocator gives
_COMPILED_SHAPES = 64  # of one stage: scales times batch sizes, beyond torch's default of 8


def eager(family: AnyFamily, system: Any, *, precision: str, device: str) -> Pipeline:
    """Return the plain modules, cast as an export in this precision casts them."""
    return _pipeline(TorchBackend, family, system, precision, device)


def graphed(family: AnyFamily, system: Any, *, precision: str, device: str) -> Pipeline:
    """Return modules that attend to the cache in place, recorded as one CUDA graph."""
    pipeline = _pipeline(RecordedTorchBackend, family, system, precision, device)
    backend = pipeline.backend
    assert isinstance(backend, RecordedTorchBackend)
    backend.attend_in_place()
    return pipeline


def compiled(
    family: AnyFamily, system: Any, *, precision: str, device: str, compiler: str = "inductor"
) -> Pipeline:
    """Return modules compiled for every shape (max-autotune), recorded as one CUDA graph.

    `compiler` is torch's name for another one: tests take "aot_eager", which compiles nothing.
    """
    mode = {"mode": "max-autotune-no-cudagraphs"} if compiler == "inductor" else {}
    backend = partial(CompiledTorchBackend, compile_options={"backend": compiler, **mode})
    return _pipeline(backend, family, system, precision, device)


def _pipeline(kind: Any, family: AnyFamily, system: Any, precision: str, device: str) -> Pipeline:
    config = system.config
    narrowed = at_precision(
        system,
        family.stages(config, kv_layout="delta", dtype=PRECISION_DTYPES[precision]),
        precision,
    )
    stages_io = family.stages_io(config, kv_layout="delta", dtype=PRECISION_DTYPES[precision])
    backend = kind(family.learner.modules(narrowed, "delta"), stages_io, device=device)
    return Pipeline(family, config, backend, tokenizer=system.prompt_tokenizer)


@dataclass(frozen=True)
class _Recording:
    """A loop as it was recorded: where its inputs lie and what it left."""

    staging: Tensor  # bytes in host memory, pinned for a GPU
    device: Tensor  # the same bytes where the stages run
    inputs: Mapping[str, Tensor]  # views of `device`
    graph: "torch.cuda.CUDAGraph | None"
    loop: Any  # what is run again where there are no graphs
    results: list[Any]


class RecordedTorchBackend(TorchBackend):
    """Records every loop once per set of input shapes; later ones are one upload and one launch.

    Results lie where the recording put them: they hold until the same loop is played again. Without
    a GPU the loop is run again on the same memory, which proves all but the graph itself.
    """

    name: ClassVar[str] = "torch_recorded"
    records: ClassVar[bool] = True

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._recordings: dict[Any, _Recording] = {}
        self._arenas: dict[KVShape, KVArena] = {}

    def attend_in_place(self) -> None:
        """Let new keys and values be written behind the past instead of joined with a copy of it.

        For stages that take their attention as a field; others stay as they are.
        """
        for module in self._stages.values():
            if hasattr(module, "attend"):
                module.attend = attend_in_place  # type: ignore[assignment]

    def new_arena(self, shape: KVShape) -> KVArena:
        """Return the one arena of this shape, empty: its addresses are part of the recordings."""
        if shape not in self._arenas:
            self._arenas[shape] = super().new_arena(shape)
        arena = self._arenas[shape]
        arena.clear()
        return arena

    @torch.inference_mode()
    def run(
        self, stage: str, feeds: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return all outputs; those already written in place are not copied."""
        io = self.stages_io[stage]
        io.check(feeds, stage)
        results = self._call(stage, tuple(feeds[name] for name in io.inputs))
        named = dict(zip(io.outputs, results, strict=True))
        for name, target in (outputs or {}).items():
            if named[name].data_ptr() != target.data_ptr():
                target.copy_(named[name])
            named[name] = target
        return named

    def _call(self, stage: str, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = self._stages[stage](*arguments)
        return results

    @torch.inference_mode()
    def play(self, name: str, inputs: Mapping[str, NDArray[Any]], loop: Loop[T]) -> Iterator[T]:
        """Return what `loop` yields, recorded at its first call with inputs of these shapes."""
        key = (name, *((n, a.shape, a.dtype.str) for n, a in inputs.items()))
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(inputs, loop)
        _fill(recording.staging, inputs)
        recording.device.copy_(recording.staging, non_blocking=True)
        if recording.graph is None:
            return iter(list(loop(self, recording.inputs)))
        recording.graph.replay()
        return iter(recording.results)

    def _record(self, inputs: Mapping[str, NDArray[Any]], loop: Loop[T]) -> _Recording:
        """Return the recording, after two runs in which kernels are chosen."""
        on_gpu = self.device.type == "cuda"
        size = _places(inputs)[1]
        staging = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu)
        device = torch.zeros(size, dtype=torch.uint8, device=self.device)
        _fill(staging, inputs)
        device.copy_(staging)
        views = _views(device, inputs)
        if not on_gpu:
            return _Recording(staging, device, views, None, loop, [])
        new_stream: Any = torch.cuda.Stream
        side = new_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                list(loop(self, views))
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = list(loop(self, views))
        return _Recording(staging, device, views, graph, loop, results)


class CompiledTorchBackend(RecordedTorchBackend):
    """RecordedTorchBackend with every stage compiled for each of its shapes."""

    name: ClassVar[str] = "torch_compiled"

    def __init__(self, *args: Any, compile_options: Mapping[str, Any], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._compiled: dict[str, Any] = {
            stage: torch.compile(module, dynamic=False, **compile_options)
            for stage, module in self._stages.items()
        }

    def _call(self, stage: str, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        limits = {"recompile_limit": _COMPILED_SHAPES, "fail_on_recompile_limit_hit": True}
        with torch._dynamo.config.patch(limits):
            results: tuple[Tensor, ...] = self._compiled[stage](*arguments)
        return results


def attend_in_place(
    q_GLHK: Tensor, k_GLHK: Tensor, v_GLHK: Tensor, past: KeyValue, *, scale: float
) -> tuple[Tensor, KeyValue]:
    """Return attention (G,L,H,K), and the new keys and values where they lie behind the past.

    As attend_delta, for pasts that are views of a DeltaArena, which has room behind them.
    """
    length = q_GLHK.shape[1]
    all_k, all_v = _grown(past[0], k_GLHK.transpose(0, 1)), _grown(past[1], v_GLHK.transpose(0, 1))
    mixed = nn.functional.scaled_dot_product_attention(
        q_GLHK.transpose(1, 2), all_k.permute(1, 2, 0, 3), all_v.permute(1, 2, 0, 3), scale=scale
    )
    new_k, new_v = all_k[-length:], all_v[-length:]
    return mixed.transpose(1, 2), (new_k, new_v)


def _grown(past_PGHK: Tensor, new_LGHK: Tensor) -> Tensor:
    """Return past and new (P+L,G,H,K) as one view, the new written behind the past."""
    length, added = past_PGHK.shape[0], new_LGHK.shape[0]
    shape = (length + added, *past_PGHK.shape[1:])
    whole = past_PGHK.as_strided(shape, past_PGHK.stride(), past_PGHK.storage_offset())
    whole[length:].copy_(new_LGHK)
    return whole


def _places(inputs: Mapping[str, NDArray[Any]]) -> tuple[dict[str, slice], int]:
    """Return where each input lies in one block of bytes, aligned, and the block's size."""
    places, stop = {}, 0
    for name, array in inputs.items():
        places[name] = slice(stop, stop + array.nbytes)
        stop += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, stop


def _fill(staging: Tensor, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Write the inputs to their places in host memory."""
    target = staging.numpy()
    for name, place in _places(inputs)[0].items():
        flat = np.ascontiguousarray(inputs[name]).reshape(-1)
        target[place] = flat.view(np.uint8)


def _views(device: Tensor, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Return the inputs as views of a block on the device."""
    views = {}
    for name, place in _places(inputs)[0].items():
        dtype = torch.from_numpy(np.empty(0, inputs[name].dtype)).dtype
        views[name] = device[place].view(dtype).reshape(inputs[name].shape)
    return views
