"""`nsp verify`: compares every stage of an engine folder with PyTorch, on this machine's backend.

Without PyTorch or the checkpoint, stages are compared with the outputs recorded at export. In a
stage that fails on ONNX Runtime, the first wrong tensor is searched (first_wrong.py).
"""

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nsp.artifacts.checkpoint import CheckpointRecord, is_checkpoint, read_checkpoint
from nsp.artifacts.engine_choice import choose_backend, choose_variants
from nsp.artifacts.engines import Engines, open_engine_dir
from nsp.artifacts.manifest import PRECISION_DTYPES, Manifest, Variant
from nsp.artifacts.repair import find_source
from nsp.config import Config
from nsp.errors import CheckpointError, EngineError, NspError, ParityError
from nsp.export.graph.dtypes import stored_precision
from nsp.export.options import ExportOptions
from nsp.export.proof.first_wrong import NodeError, first_wrong_tensor
from nsp.export.proof.gates import LIMITS
from nsp.export.proof.parity import Subject, check_stage
from nsp.export.proof.recorded import Recording, read_recorded
from nsp.export.proof.repro import reproducible
from nsp.family.gate import Gate
from nsp.stage.backend import Backend

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageCheck(Config):
    """The result of the check of one stage."""

    stage: str
    passed: bool
    calls: int
    largest_error: float | None  # of all outputs, relative to their ranges; None if not measured
    error: str | None  # the gate that failed
    first_wrong: str | None = None  # tensor, operator and error, or why there is none


@dataclass(frozen=True, kw_only=True)
class Verification(Config):
    """The result of the check of an engine folder."""

    engine_dir: str
    backend: str
    precision: str
    reference: str  # in words
    stages: tuple[StageCheck, ...]

    def failure(self) -> ParityError | None:
        """Return the first failed stage as an error, None when all passed."""
        failed = [check for check in self.stages if not check.passed]
        if not failed:
            return None
        first, more = failed[0], len(failed) - 1
        where = f"; first wrong tensor: {first.first_wrong}" if first.first_wrong else ""
        others = f"; {more} more stages fail" if more else ""
        return ParityError(f"{first.error}{where}{others}")


@dataclass(frozen=True)
class _Truth:
    """What stages are compared with: recorded calls and, with PyTorch, their model."""

    words: str
    recordings: tuple[Recording, ...]
    selection: Backend | None = None  # PyTorch's, which draws tokens
    system: Any = None


def verify(
    engine_dir: Path,
    *,
    backend: str = "auto",
    precision: str | None = None,
    checkpoint: Path | None = None,
    recorded: bool = False,
    verify_digests: bool = True,
    num_threads: int | None = None,
) -> Verification:
    """Return the results of all stages; a failed stage does not raise an error.

    `recorded`: use the recorded outputs even if PyTorch is available.
    `verify_digests=False` accepts engines and a checkpoint that differ from their digests.
    `num_threads` as for `open_engine_dir`. Raises
    EngineError for a folder that is damaged, for another machine, or has nothing to compare with,
    BackendError for a backend that does not work, CheckpointError for a `checkpoint` that does not
    fit.
    """
    engines = open_engine_dir(
        engine_dir,
        backend,
        precision=precision,
        num_threads=num_threads,
        verify=verify_digests,
    )
    manifest = engines.manifest
    truth = _truth(
        engine_dir,
        manifest,
        checkpoint,
        recorded=recorded,
        limit=engines.max_batch,
        verify_digests=verify_digests,
    )
    graphs = _graphs(engine_dir, manifest, engines)
    declared = engines.family.stages(
        manifest.model_config,
        kv_layout=engines.backend.kv_layout,
        dtype=PRECISION_DTYPES[engines.precision],
    )
    checks = []
    for stage in engines.backend.stages_io:
        logger.info("checking %s", stage)
        precision = stored_precision(declared[stage], engines.precision)
        gate = declared[stage].gate
        checks.append(_check(engine_dir, graphs.get(stage), engines, stage, gate, precision, truth))
    return Verification(
        engine_dir=str(engine_dir),
        backend=engines.backend.name,
        precision=engines.precision,
        reference=truth.words,
        stages=tuple(checks),
    )


def _truth(
    folder: Path,
    manifest: Manifest,
    checkpoint: Path | None,
    *,
    recorded: bool,
    limit: int | None,
    verify_digests: bool,
) -> _Truth:
    """Return what to compare the stages with: PyTorch if it is available."""
    if not recorded and importlib.util.find_spec("torch") is not None:
        try:
            source = checkpoint or find_source(folder, manifest)
            record = _matching_checkpoint(source, manifest, verify=verify_digests)
        except CheckpointError as error:
            if checkpoint is not None:
                raise
            logger.warning("using recorded outputs instead of PyTorch: %s", error)
        else:
            return _live_truth(record, limit)
    elif checkpoint is not None:
        raise CheckpointError(
            f"{checkpoint} cannot be run: torch is missing, or --recorded was given"
        )
    try:
        recordings = read_recorded(folder, manifest)
    except EngineError as error:
        if recorded:
            raise
        raise EngineError(
            f"{error}, and the PyTorch model is not available; give it with --checkpoint where "
            "torch is installed, or export the folder again"
        ) from error
    return _Truth("outputs recorded at export", recordings)


def _matching_checkpoint(folder: Path, manifest: Manifest, *, verify: bool) -> CheckpointRecord:
    if not is_checkpoint(folder):
        raise CheckpointError(f"there is no checkpoint at {folder}; give it with --checkpoint")
    record = read_checkpoint(folder, verify=verify)
    if record.weights_hash() != manifest.model_hash:
        raise CheckpointError(f"{folder} has another model than the one the engines were made from")
    return record


def _live_truth(record: CheckpointRecord, limit: int | None) -> _Truth:
    """Return PyTorch's calls, made now; only batches that fit the engines."""
    from nsp.export.plan import ExportPlan
    from nsp.export.proof.reference import record_reference

    plan = ExportPlan(
        options=ExportOptions(checkpoint=str(record.folder)),
        record=record,
        config=record.family.config.from_dict(record.config),
        sampling=record.family.sampling.from_dict(record.sampling),
        model_hash=record.weights_hash(),
        builds=(),
    )
    system = record.load()
    made = record_reference(plan, system)
    fitting = (b.recording for b in made.batches if limit is None or len(b.orders) <= limit)
    return _Truth("PyTorch float32, now", tuple(fitting), made.pipeline.backend, system)


def _graphs(folder: Path, manifest: Manifest, engines: Engines) -> Mapping[str, Variant]:
    """Return the variants that ONNX Runtime runs; none for another backend."""
    if engines.backend.name != "onnxruntime":
        return {}
    chosen, device = choose_backend(folder, manifest, engines.backend.name, None)
    found = choose_variants(folder, manifest, chosen, device=device, precision=engines.precision)
    return found.stages


def _check(
    folder: Path,
    variant: Variant | None,
    engines: Engines,
    stage: str,
    gate: Gate,
    precision: str,
    truth: _Truth,
) -> StageCheck:
    """Return the result of one stage, with its first wrong tensor if it failed."""
    graph = folder / next(iter(variant.files)) if variant is not None else None
    try:
        with reproducible(
            engines.backend,
            stage,
            [call for each in truth.recordings for call in each.calls],
            allowed=partial(LIMITS[precision].allowed, gate),
            graph=graph,
            folder=folder,
        ) as backend:
            subject = Subject(
                stage=stage,
                io=engines.backend.stages_io[stage],
                gate=gate,
                backend=backend,
                precision=precision,
                label=f"{stage} ({engines.backend.name} {precision})",
            )
            figures = check_stage(subject, truth.recordings, truth.selection)
    except ParityError as error:
        wrong = None
        if variant is not None and graph is not None:
            wrong = _locate(graph, variant, engines, stage, precision, truth)
        return StageCheck(
            stage=stage,
            passed=False,
            calls=0,
            largest_error=None,
            error=str(error),
            first_wrong=wrong,
        )
    worst = max((each["relative"] for each in figures["outputs"].values()), default=0.0)
    return StageCheck(
        stage=stage, passed=True, calls=figures["calls"], largest_error=worst, error=None
    )


def _locate(
    graph: Path, variant: Variant, engines: Engines, stage: str, precision: str, truth: _Truth
) -> str:
    """Return the first wrong tensor of a failed stage in words."""
    try:
        found = first_wrong_tensor(
            graph,
            truth.system,
            family=engines.family,
            stage=stage,
            io=variant.stage_io,
            precision=variant.precision,
            kv_layout=variant.kv_layout,
            opset=variant.opset,
            recordings=truth.recordings,
            limit=LIMITS[precision].relative_error,
        )
    except (NspError, ImportError) as error:
        return f"not found ({error})"
    return _in_words(found)


def _in_words(found: NodeError | None) -> str:
    if found is None:
        return (
            "none: with its inner tensors as outputs the graph computes the same as PyTorch, so "
            "an optimisation of the runtime causes the error"
        )
    return (
        f"{found.tensor!r}, output of {found.op} {found.node!r} in call {found.call}: max abs "
        f"error {found.error:.2e} of its range"
    )
