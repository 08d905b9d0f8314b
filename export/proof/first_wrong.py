"""Finds the first wrong tensor of an ONNX stage by comparing it with a fresh export.

The graph and a fresh export of the PyTorch model get the same inputs, and their inner tensors
become outputs, some at a time. Exports are deterministic, so in the same precision tensors of the
same name have the same meaning. The fresh graph is run without graph optimisations.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.artifacts.manifest import PRECISION_DTYPES
from nsp.errors import ExportError
from nsp.export.proof.forced import repeat
from nsp.export.proof.gates import relative_error
from nsp.export.proof.recorded import Recording
from nsp.family.contract import AnyFamily, trace_sizes
from nsp.stage.arena import HostArrays
from nsp.stage.backend import Backend
from nsp.stage.io import Shape, StageIO

_AT_ONCE = 64  # inner tensors in memory at the same time


@dataclass(frozen=True)
class NodeError:
    """The first tensor outside the tolerance, in order of computation."""

    call: int  # of the stage, from 0, over all recordings
    tensor: str
    node: str
    op: str
    error: float  # divided by the range of the reference's tensor


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
        raise ExportError("the search needs the PyTorch model; give --checkpoint")
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
        known = {name for name, _, _ in _tensors(path)}
        inner = [each for each in _tensors(graph) if each[0] in known]
        if not inner:
            raise ExportError(f"{graph} and a fresh export have no tensor names in common")
        for start in range(0, len(inner), _AT_ONCE):
            part = inner[start : start + _AT_ONCE]
            names = [name for name, _, _ in part]
            probes = (
                _Probe(graph, ours / str(start), names, optimised=True),
                _Probe(path, fresh / str(start), names, optimised=False),
            )
            both = _Both(io, kv_layout, probes, limit)
            for recording in recordings:
                for _ in repeat(stage, io, both, recording):
                    pass
            for name, node, op in part:
                if name in both.worst:
                    call, error = both.worst[name]
                    return NodeError(call, name, node, op, error)
    return None


def _tensors(graph: Path) -> list[tuple[str, str, str]]:
    """Return (tensor, node, operator) for all outputs of nodes, in order of computation."""
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    return [
        (name, node.name, node.op_type)
        for node in nodes
        if node.op_type != "Constant"  # Polygraphy cannot turn these into outputs
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
            if path.is_file() and path != graph:  # external weights
                _link(path, folder / path.name)
        model = onnx.load(graph, load_external_data=False)
        self.names = names
        outputs = [output.name for output in model.graph.output]
        self._wanted = [*dict.fromkeys([*names, *outputs])]
        onnx.save(modify_outputs(model, [*outputs, *names]), folder / graph.name)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if not optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(
            folder / graph.name, options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [argument.name for argument in self._session.get_inputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the inner tensors and all outputs."""
        found = self._session.run(self._wanted, {name: feeds[name] for name in self._inputs})
        return dict(zip(self._wanted, found, strict=True))


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file, not a symbolic link: ONNX Runtime does not follow these."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class _Both(Backend):
    """Runs the graph under test and the fresh one, and records the differences.

    It returns the outputs of the fresh graph, which also go into the cache.
    """

    name = "both"

    def __init__(
        self, io: StageIO, kv_layout: str, probes: tuple[_Probe, _Probe], limit: float
    ) -> None:
        super().__init__({})
        self.kv_layout, self._io, self._limit = kv_layout, io, limit
        self._ours, self._fresh = probes
        self._memory, self._num_calls = HostArrays(), 0
        self.worst: dict[str, tuple[int, float]] = {}  # by tensor: the call and its error

    def run(
        self, stage: str, feeds: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the fresh graph's outputs."""
        expected, found = self._fresh.run(feeds), self._ours.run(feeds)
        for name in self._fresh.names:
            if np.issubdtype(expected[name].dtype, np.floating):
                error = relative_error(expected[name], found[name])
                if error > self._limit and name not in self.worst:
                    self.worst[name] = (self._num_calls, error)
        self._num_calls += 1
        for name, place in (outputs or {}).items():
            place[...] = expected[name]
        return {name: expected[name] for name in self._io.outputs}

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array."""
        return array

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy."""
        return np.array(array)

    def allocate(self, shape: Shape, dtype: str) -> NDArray[Any]:
        """Return uninitialised memory."""
        return self._memory.allocate(shape, dtype)

    def copy_rows(self, source: Any, target: Any) -> None:
        """Fill `target` with the first rows of `source`."""
        self._memory.copy_rows(source, target)
