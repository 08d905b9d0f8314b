"""What else one could run: torch.compile, a plain ONNX export, the engines in other precisions.

Each is an ordinary backend, so that the same loop drives it in the same rounds. The first two are
made from the baseline's checkpoint, on a CPU only; a rival that cannot be made is reported with the
reason.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.manifest import PRECISION_DTYPES, Manifest, read_manifest
from nsp.backends.available import backend_record
from nsp.benchmarks.contest.rounds import Contestant
from nsp.benchmarks.contest.subject import Subject
from nsp.benchmarks.record.result import Entry
from nsp.errors import BackendError, ConfigError, NspError
from nsp.family.contract import AnyFamily
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from nsp.stage.arena import HostArrays, KVArena, KVShape
from nsp.stage.backend import Backend
from nsp.stage.io import StageIO

logger = logging.getLogger(__name__)

_PLAIN_OPSET = 18  # what torch.onnx.export writes unless told otherwise


@dataclass(frozen=True)
class Rival:
    """One way to run the model; `make` returns its backend from a loaded system."""

    name: str
    what: str
    make: Callable[[Pipeline, Any, int], Backend]


def _compiled(reference: Pipeline, system: Any, threads: int) -> Backend:
    """Return the PyTorch backend with every stage compiled; threads are the process's."""
    from nsp.backends.torch import TorchBackend

    stages = reference.family.learner.modules(system, "delta")
    backend = TorchBackend(stages, reference.backend.stages_io, kv_layout="delta", device="cpu")
    for module in stages.values():
        module.compile()
    return backend


def _plain_onnx(reference: Pipeline, system: Any, threads: int) -> Backend:
    """Return ONNX Runtime with what `torch.onnx.export` makes of the modules as they stand."""
    family = reference.family
    if "present" not in family.kv_layouts:
        raise BackendError(f"the cache of family {family.name} is not joined in a graph")
    stages_io: Mapping[str, StageIO] = family.stages_io(
        system.config, kv_layout="present", dtype="float32"
    )
    timed = [stage for stage in stages_io if stage != "select_smooth"]
    with tempfile.TemporaryDirectory(prefix="nsp-plain-") as root:
        files = export_plain(family, system, {n: stages_io[n] for n in timed}, Path(root))
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


RIVALS: Mapping[str, Rival] = {
    "torch.compile": Rival("torch.compile", "PyTorch with torch.compile, default mode", _compiled),
    "plain-onnx": Rival(
        "plain-onnx",
        "torch.onnx.export as it stands, caches joined in the graph and handed over as new "
        "arrays, ONNX Runtime with default options",
        _plain_onnx,
    ),
}


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
        options.intra_op_num_threads = num_threads  # as all contestants
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
        if stage == "step" and self._arena is not None:
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


RIVAL_NAMES = (*RIVALS, *PRECISION_DTYPES)


@dataclass(frozen=True)
class _Asked:
    """A rival of one benchmark."""

    name: str
    what: str
    make: Callable[[], Pipeline]


def make_rivals(
    names: Sequence[str],
    subject: Subject,
    *,
    threads: int,
    batches: Sequence[int],
    seed: int,
    on_start: Callable[[str], None],
) -> Iterator[tuple[Entry, Contestant | None]]:
    """Yield every rival asked for: ready, having made a batch of every size, or with its reason.

    `names` are of RIVALS, or precisions: those are the same folder's engines in another one.
    """
    for name in names:
        asked = _made(RIVALS[name], subject, threads) if name in RIVALS else _other(name, subject)
        on_start(f"preparing {asked.name}")
        start = time.perf_counter()
        try:
            pipeline = asked.make()
            for batch in batches:
                pipeline.generate(**subject.request(batch, seed))
        except (NspError, RuntimeError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("%s is not timed: %s", asked.name, reason)
            yield Entry(name=asked.name, what=asked.what, missing=reason), None
            continue
        seconds = round(time.perf_counter() - start, 2)
        entry = Entry(name=asked.name, what=asked.what, prepare_s=seconds)
        yield entry, Contestant(asked.name, pipeline)


def other_precisions(subject: Subject) -> tuple[str, ...]:
    """Return the precisions the engine folder has besides the candidate's, and the device runs."""
    pipeline = subject.candidate.pipeline
    record, used = backend_record(pipeline.backend.name), pipeline.precision
    manifest = read_manifest(subject.candidate.source.path)
    found = (manifest.variants(stage, record.built_for) for stage in manifest.stages)
    held = {variant.precision for variants in found for variant in variants}
    runs = record.precisions["cuda" if subject.device == "cuda" else "cpu"]
    return tuple(each for each in runs if each in held and each != used)


def _made(rival: Rival, subject: Subject, threads: int) -> _Asked:
    return _Asked(rival.name, rival.what, lambda: _pipeline(rival, subject, threads))


def _other(precision: str, subject: Subject) -> _Asked:
    """Return the candidate's folder in another precision."""
    source, used = subject.candidate.source, subject.candidate.pipeline.precision

    def load() -> Pipeline:
        if precision == used:
            raise ConfigError(f"the measured engines are already {used}; choose another precision")
        options = {**source.options, "precision": precision}
        return load_pipeline(source.path, source.backend, **options)

    manifest = read_manifest(source.path)
    what = f"the same engines in {precision}{gate_words(manifest, source.backend, precision)}"
    return _Asked(f"{source.name} {precision}", what, load)


def gate_words(manifest: Manifest, backend: str, precision: str) -> str:
    """Return what the export's gate measured of the logits in this precision, or nothing."""
    held = [v for stage in manifest.stages for v in manifest.variants(stage, backend)]
    for variant in held:
        units = [each for each in variant.parity.get("units", ()) if "tokens" in each]
        if variant.precision == precision and units:
            error = variant.parity["outputs"]["logits"]["relative"]
            count = sum(each["tokens"] for each in units)
            equal = sum(each["tokens"] * each["agreement"] for each in units) / count
            worst = min(each["agreement"] for each in units)
            return (
                f": at its export the logits were off by at most {100 * error:.2g} % of their "
                f"range, and {100 * equal:.4g} % of {count} sampled tokens were PyTorch's "
                f"({100 * worst:.4g} % in the worst scale)"
            )
    return ""


def _pipeline(rival: Rival, subject: Subject, threads: int) -> Pipeline:
    """Return the rival's pipeline; raise BackendError where there is nothing to make it from."""
    if subject.baseline is None:
        raise BackendError(f"it needs the PyTorch model: {subject.baseline_missing}")
    if subject.device != "cpu":
        raise BackendError(
            f"nsp bench times it only on a CPU, but the engines run on {subject.device}"
        )
    reference = subject.baseline.pipeline
    system = read_checkpoint(subject.baseline.source.path).load()
    return Pipeline(
        reference.family,
        reference.config,
        rival.make(reference, system, threads),
        tokenizer=reference.tokenizer,
        sampling=subject.candidate.pipeline.sampling,
    )
