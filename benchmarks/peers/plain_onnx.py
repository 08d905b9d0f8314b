"""A plain ONNX export of the unchanged modules, run as ONNX Runtime's first example shows it."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nsp.errors import BackendError
from nsp.family.contract import AnyFamily
from nsp.family.gate import Tokens
from nsp.pipeline.pipeline import Pipeline
from nsp.stage.arena import HostArrays, KVArena, KVShape, is_cached
from nsp.stage.backend import Backend
from nsp.stage.io import StageIO

_PLAIN_OPSET = 18  # what torch.onnx.export writes unless told otherwise


def plain_onnx(reference: Pipeline, system: Any, *, threads: int) -> Backend:
    """Return ONNX Runtime with what `torch.onnx.export` makes of the modules as they stand."""
    family = reference.family
    if "present" not in family.kv_layouts:
        raise BackendError(f"the cache of family {family.name} is not joined in a graph")
    declared = family.stages(system.config, kv_layout="present", dtype="float32")
    gates = [stage.gate for stage in declared.values()]
    # Of the stages that may draw tokens only the first is used with a model's own settings.
    others = {name for gate in gates if isinstance(gate, Tokens) for name in gate.drawn_by[1:]}
    stages_io = {name: stage.io for name, stage in declared.items() if name not in others}
    with tempfile.TemporaryDirectory(prefix="nsp-plain-") as root:
        files = export_plain(family, system, stages_io, Path(root))
        return PlainOnnxBackend(files, stages_io, num_threads=threads)


def export_plain(
    family: AnyFamily, system: Any, stages_io: Mapping[str, StageIO], root: Path
) -> dict[str, Path]:
    """Return the ONNX files of some stages, written below `root` with the exporter's defaults."""
    from nsp.export.graph.onnx_export import export_stage
    from nsp.family.contract import trace_sizes

    declared = family.stages(system.config, kv_layout="present", dtype="float32")
    stages: Mapping[str, Any] = family.learner.modules(system, "present")
    for module in stages.values():
        if hasattr(module, "attend"):
            module.attend = attend_joined
    files = {}
    for stage, io in stages_io.items():
        (folder := root / stage).mkdir()
        files[stage] = export_stage(
            stages[stage],
            io,
            folder,
            name=stage,
            opset=_PLAIN_OPSET,
            trace_sizes=trace_sizes(declared),
            metadata={},
        )
    return files


def attend_joined(q_GLHK: Any, k_GLHK: Any, v_GLHK: Any, past: Any, *, scale: float) -> Any:
    """Return attention (G,L,H,K) and all keys and values (G,H,P+L,K): the usual model code."""
    import torch
    import torch.nn.functional as F

    k = torch.cat([past[0], k_GLHK.transpose(1, 2)], dim=2)
    v = torch.cat([past[1], v_GLHK.transpose(1, 2)], dim=2)
    mixed = F.scaled_dot_product_attention(q_GLHK.transpose(1, 2), k, v, scale=scale)
    return mixed.transpose(1, 2), (k, v)


class PlainOnnxBackend(HostArrays, Backend):
    """ONNX Runtime as its first example shows it: `session.run` on dictionaries of new arrays."""

    name: ClassVar[str] = "plain-onnx"
    kv_layout = "present"

    def __init__(
        self, files: Mapping[str, Path], stages_io: Mapping[str, StageIO], *, num_threads: int
    ) -> None:
        super().__init__(stages_io)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads  # as all contenders
        self._sessions = {
            stage: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for stage, path in files.items()
        }
        self._arena: _JoinedArena | None = None

    def run(
        self, stage: str, feeds: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return all outputs as new arrays; the cache among them becomes the next past."""
        session = self._sessions[stage]
        names = [argument.name for argument in session.get_inputs()]
        found = session.run(list(self.stages_io[stage].outputs), {n: feeds[n] for n in names})
        results = dict(zip(self.stages_io[stage].outputs, found, strict=True))
        if self._arena is not None and any(map(is_cached, results)):
            self._arena.take(results)
        return results

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array."""
        return np.asarray(array, order="C")

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy."""
        return np.array(array)

    def new_arena(self, shape: KVShape) -> KVArena:
        """Return a cache that keeps what the last step returned."""
        self._arena = _JoinedArena(shape)
        return self._arena


class _JoinedArena(KVArena):
    """No arena at all: the arrays of the last step."""

    def __init__(self, shape: KVShape) -> None:
        super().__init__(shape)
        empty = np.empty((shape.rows, shape.num_heads, 0, shape.head_width), shape.dtype)
        self._past: dict[str, Any] = dict.fromkeys(self._names("past"), empty)

    def past(self) -> dict[str, Any]:
        """Return the last step's keys and values."""
        return self._past

    def keep_rows(self, rows: int) -> None:
        """Keep copies of the first rows."""
        self._past = {name: np.array(array[:rows]) for name, array in self._past.items()}
        self.shape = replace(self.shape, rows=rows)

    def new(self, num_tokens: int) -> dict[str, Any]:
        """Return nothing: outputs are new arrays."""
        return {}

    def take(self, results: Mapping[str, Any]) -> None:
        """Keep a step's keys and values."""
        names = zip(self._names("past"), self._names("new"), strict=True)
        self._past = {past: results[new] for past, new in names}
