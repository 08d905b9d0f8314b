"""The first wrong tensor of an ONNX stage: its graph beside a fresh export of the PyTorch model.

Both graphs get the same inputs, with their inner tensors made outputs, some at a time. Exports are
deterministic, so in the same precision tensors of the same name are the same quantity. The fresh
graph is run without graph optimisations.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nsp.artifacts.manifest import PRECISION_DTYPES
from nsp.errors import ExportError
from nsp.export.proof.recorded import Recording, relative_error
from nsp.family.contract import AnyFamily, trace_sizes
from nsp.stage.arena import ARENAS, HostArrays, KVArena
from nsp.stage.io import StageIO

_AT_ONCE = 64  # inner tensors held in memory together

# Takes a call's outputs into the cache.
Advance: TypeAlias = Callable[[Mapping[str, NDArray[Any]]], None]


@dataclass(frozen=True)
class NodeError:
    """One tensor out of tolerance; everything before it is within."""

    call: int  # of the stage, from 0, over all recordings
    tensor: str
    node: str
    op: str
    error: float  # over the range of the reference's


def first_wrong_tensor(
    graph: Path,
    system: Any,
    *,
    family: AnyFamily,
    stage: str,
    io: StageIO,
    precision: str,
    kv_layout: str,
    opset: int,
    recordings: Sequence[Recording],
    limit: float,
) -> NodeError | None:
    """Return the first tensor, in order of computation, that differs by more than `limit`.

    None when there is none. Raises ExportError without a PyTorch model (`system` is None), or when
    the graphs have no inner tensors in common.
    """
    if system is None:
        raise ExportError("the PyTorch model is needed to search for it; give --checkpoint")
    from nsp.export.graph.narrow import at_precision
    from nsp.export.graph.onnx_export import export_stage

    dtype = PRECISION_DTYPES[precision]
    declared = family.stages(system.config, kv_layout=kv_layout, dtype=dtype)
    narrowed = at_precision(system, declared, precision)
    with tempfile.TemporaryDirectory(prefix="nsp-verify-") as root:
        fresh, ours = Path(root) / "fresh", Path(root) / "ours"
        fresh.mkdir()
        module = family.learner.modules(narrowed, kv_layout)[stage]
        path = export_stage(
            module,
            io,
            fresh,
            name=stage,
            opset=opset,
            trace_sizes=trace_sizes(declared),
            metadata={},
        )
        both = {name for name, _, _ in _tensors(path)}
        inner = [each for each in _tensors(graph) if each[0] in both]
        if not inner:
            raise ExportError(f"{graph} and a fresh export share no tensor names")
        for start in range(0, len(inner), _AT_ONCE):
            part = inner[start : start + _AT_ONCE]
            names = [name for name, _, _ in part]
            wrong = _first_in(
                part,
                _Probe(graph, ours / str(start), names, optimised=True),
                _Probe(path, fresh / str(start), names, optimised=False),
                _feeds(stage, io, kv_layout, recordings),
                limit,
            )
            if wrong is not None:
                return wrong
    return None


def _tensors(graph: Path) -> list[tuple[str, str, str]]:
    """Return (tensor, node, operator) of what nodes compute, in order of computation."""
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    return [
        (name, node.name, node.op_type)
        for node in nodes
        if node.op_type != "Constant"  # which Polygraphy makes no outputs
        for name in node.output
        if name
    ]


class _Probe:
    """A session of a graph with some inner tensors among its outputs."""

    def __init__(self, graph: Path, folder: Path, names: Sequence[str], *, optimised: bool) -> None:
        import onnx
        import onnxruntime as ort
        from polygraphy.backend.onnx import modify_outputs

        folder.mkdir(parents=True)
        for path in graph.parent.iterdir():
            if path.is_file() and path != graph:  # weights beside the graph
                _link(path, folder / path.name)
        model = onnx.load(graph, load_external_data=False)
        self.outputs = [output.name for output in model.graph.output]
        onnx.save(modify_outputs(model, [*self.outputs, *names]), folder / graph.name)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if not optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(
            folder / graph.name, options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [argument.name for argument in self._session.get_inputs()]

    def run(
        self, feeds: Mapping[str, NDArray[Any]], names: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        """Return the named tensors and all outputs."""
        wanted = [*dict.fromkeys([*names, *self.outputs])]
        found = self._session.run(wanted, {name: feeds[name] for name in self._inputs})
        return dict(zip(wanted, found, strict=True))


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file; ONNX Runtime follows no symbolic link out of a folder."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _first_in(
    part: Sequence[tuple[str, str, str]],
    ours: _Probe,
    fresh: _Probe,
    calls: Iterator[tuple[dict[str, NDArray[Any]], Advance]],
    limit: float,
) -> NodeError | None:
    """Return the first wrong one of some tensors over all recorded calls."""
    names = [name for name, _, _ in part]
    worst: dict[str, tuple[int, float]] = {}
    for number, (feeds, advance) in enumerate(calls):
        expected, found = fresh.run(feeds, names), ours.run(feeds, names)
        for name in names:
            if np.issubdtype(expected[name].dtype, np.floating):
                error = relative_error(expected[name], found[name])
                if error > limit and name not in worst:
                    worst[name] = (number, error)
        advance(expected)
    for name, node, op in part:
        if name in worst:
            call, error = worst[name]
            return NodeError(call, name, node, op, error)
    return None


def _feeds(
    stage: str, io: StageIO, kv_layout: str, recordings: Sequence[Recording]
) -> Iterator[tuple[dict[str, NDArray[Any]], Advance]]:
    """Yield the inputs of every recorded call, with what takes its outputs into the cache."""
    recorded = {n for each in recordings for c in each.calls if c.stage == stage for n in c.feeds}
    cached = [
        spec.dtype
        for name, spec in io.inputs.items()
        if name.startswith("past_") and name not in recorded
    ]
    for recording in recordings:
        arena: KVArena | None = None
        if cached:
            kv = replace(recording.kv, dtype=cached[0])
            arena = ARENAS[kv_layout](kv, HostArrays())
        for call in recording.calls:
            if call.stage != stage:
                continue
            feeds: dict[str, Any] = {
                name: np.asarray(array, io.inputs[name].dtype) for name, array in call.feeds.items()
            }
            if arena is not None:
                if call.rows < arena.shape.rows:
                    arena.keep_rows(call.rows)
                feeds |= arena.past()

            def advance(
                results: Mapping[str, NDArray[Any]],
                arena: KVArena | None = arena,
                count: int = call.num_new,
            ) -> None:
                if arena is None:
                    return
                for name, place in arena.new(count).items():
                    target: Any = place
                    target[...] = results[name]
                arena.advance(count)

            yield feeds, advance
