"""An export from start to end: plan -> (ONNX -> lint -> parity -> engine) per stage -> manifest.

    manifest = export(ExportOptions(checkpoint="runs/1/checkpoint", precisions=("fp16",)))

`plan` returns what that would do. Torch is imported only when something must be built.
"""

import errno
import logging
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.artifacts.checkpoint import is_checkpoint
from nsp.artifacts.manifest import (
    RECORDED_DIR,
    SCHEMA,
    TOKENIZER_DIR,
    Manifest,
    Variant,
    read_manifest,
)
from nsp.artifacts.repair import DEMO, find_source, source_name
from nsp.errors import CheckpointError, ConfigError, EngineError, ExportError
from nsp.export.options import ExportEvent, ExportOptions, OnEvent
from nsp.export.plan import ExportPlan, PlannedBuild, make_plan
from nsp.export.proof.recorded import write_recorded
from nsp.export.store import EngineStore, with_variant
from nsp.files import name_problem
from nsp.paths import check_output, describe
from nsp.text.tokenizer_folder import TOKENIZER_FILES

if TYPE_CHECKING:
    from nsp.export.build import StageBuilder

__all__ = ["ExportEvent", "ExportOptions", "PlannedBuild", "export", "find_checkpoint", "plan"]

logger = logging.getLogger(__name__)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def plan(options: ExportOptions) -> list[PlannedBuild]:
    """Return what `export` would do, stage by stage, without writing anything."""
    return list(_prepare(options)[1].builds)


def export(options: ExportOptions, *, on_event: OnEvent | None = None) -> Manifest:
    """Export a checkpoint to an engine folder and return its manifest.

    Existing unchanged stages are reused; an interrupted export continues where it stopped. Raises
    ConfigError, CheckpointError or BackendError before anything is written, ParityError when a
    stage fails its gate, ExportError when a step fails; the engines that were in the folder before
    stay usable in every case.
    """
    store, todo = _prepare(options)
    if store.previous is not None and store.previous.model_hash != todo.model_hash:
        old, new = store.previous.source, source_name(Path(options.checkpoint))
        logger.warning("%s: replacing the engines of %s by those of %s", store.folder, old, new)
    _check_space(todo, store.folder)
    with _writing(store.folder), store.lock():
        try:
            return _run(todo, store, on_event or (lambda event: None))
        finally:
            store.abandon()


def _prepare(options: ExportOptions) -> tuple[EngineStore, ExportPlan]:
    """Return the engine folder and the plan; raise as `export` does before anything is written."""
    folder = Path(options.engine_dir)
    if problem := name_problem(folder):
        raise ConfigError(f"{folder} {problem}")
    if is_checkpoint(folder):
        raise ConfigError(f"{folder} is a checkpoint; choose another --engine-dir")
    check_output(folder, "--engine-dir")
    _check_source(Path(options.checkpoint))
    store = EngineStore(folder)
    todo = make_plan(options, store)
    store.check_is_ours({build.stage for build in todo.builds})
    if untrained := _untrained(todo.record.notes):
        logger.warning("%s: never trained: %s", options.checkpoint, ", ".join(untrained))
    return store, todo


def _check_source(checkpoint: Path) -> None:
    """Raise ConfigError if engines are given instead of a checkpoint."""
    if describe(checkpoint).kind != "engines":
        return
    try:
        found = find_source(checkpoint, read_manifest(checkpoint))
        source = f": --checkpoint {shlex.quote(str(found))}"
    except (CheckpointError, EngineError):  # this check does not need a valid manifest
        source = ""
    raise ConfigError(
        f"{checkpoint} has engines, the result of an export; give the checkpoint that these were "
        f"made from{source}"
    )


def _untrained(notes: Mapping[str, Any]) -> list[str]:
    """Return the phases without any step, of the run that a checkpoint comes from."""
    run, steps = notes.get("run"), notes.get("steps")
    phases = run.get("phases") if isinstance(run, Mapping) else None
    if not isinstance(phases, list) or not isinstance(steps, Mapping):
        return []
    names = [phase.get("name") for phase in phases if isinstance(phase, Mapping)]
    return [name for name in names if isinstance(name, str) and not steps.get(name)]


def find_checkpoint(root: Path | None = None) -> Path:
    """Return the newest run's checkpoint under `root`/runs, otherwise the bundled demo model.

    `root` is the current folder by default. Raises CheckpointError when there is neither.
    """
    runs = (root or Path.cwd()) / "runs"
    found = [path for path in runs.glob("*/checkpoint") if is_checkpoint(path)]
    if found:
        newest = max(found, key=lambda path: (path / "config.json").stat().st_mtime)
        logger.info("checkpoint: %s, the newest of %d training runs", newest, len(found))
        return newest
    if is_checkpoint(DEMO):
        logger.info("checkpoint: the bundled demo model, because %s has no training run", runs)
        return DEMO
    raise CheckpointError(
        f"no checkpoint: {runs} has no training run, and {DEMO} has no demo model; "
        "run: python train.py, or give --checkpoint"
    )


def _run(todo: ExportPlan, store: EngineStore, on_event: OnEvent) -> Manifest:
    """Build the stages of the plan, check them, and publish them."""
    started = time.monotonic()
    manifest = _new_manifest(todo)
    progress = _Progress(todo, on_event)
    builder = _builder(todo, store, progress) if _has_work(todo) else None
    for build in todo.builds:
        if build.action == "build":
            assert builder is not None
            variant = builder.build(build)
        else:
            variant = _existing(build, manifest)
            progress.report(build, "reuse", 1.0, build.reason)
        manifest = with_variant(manifest, build.stage, variant)
        if builder is not None:
            store.record(manifest)
        progress.finish(build)
    if builder is not None:
        manifest = builder.check_images(manifest)
    recorded = {} if store.previous is None else store.previous.recorded
    if builder is not None:
        recorded = _recorded(builder, todo, store)
    manifest = replace(
        manifest,
        files=_tokenizer_files(todo, store),
        recorded=recorded,
        costs=_costs(builder, todo, store),
    )
    kept = store.kept(manifest)
    for stage, variants in kept.items():
        for variant in variants:
            manifest = with_variant(manifest, stage, variant)
    store.publish(manifest)
    progress.done(f"{store.folder} is ready after {time.monotonic() - started:.1f} s")
    return manifest


def _has_work(todo: ExportPlan) -> bool:
    """Return whether anything must be built, or was built but not yet checked as a whole."""
    return any(build.action == "build" or build.is_unpublished for build in todo.builds)


def _builder(todo: ExportPlan, store: EngineStore, progress: "_Progress") -> "StageBuilder":
    from nsp.export.build import StageBuilder  # imports torch

    return StageBuilder(todo, store, progress.report)


def _new_manifest(todo: ExportPlan) -> Manifest:
    return Manifest(
        schema=SCHEMA,
        family=todo.record.family.name,
        config=dict(todo.record.config),
        model_hash=todo.model_hash,
        source=source_name(todo.record.folder),
        sampling=todo.sampling.to_dict(),
        stages={},
    )


def _existing(build: PlannedBuild, manifest: Manifest) -> Variant:
    """Return the variant whose files are reused or shared, in this build's precision."""
    variant = build.found
    if variant is None:
        variant = next(
            v for v in manifest.stages[build.stage] if v.fingerprint == build.fingerprint
        )
    # The precision's Literal type is not seen through `replace`.
    return replace(variant, precision=build.precision)  # type: ignore[arg-type]


def _tokenizer_files(todo: ExportPlan, store: EngineStore) -> dict[str, str]:
    """Copy the prompt tokenizer to the staging folder, and return {path: SHA-256}."""
    source, listed = todo.record.folder / TOKENIZER_DIR, todo.record.files
    names = [n for n in TOKENIZER_FILES if not listed or f"{TOKENIZER_DIR}/{n}" in listed]
    names = [name for name in names if (source / name).is_file()]
    if not names:
        return {}
    with store.new_folder() as folder:
        for name in names:
            shutil.copyfile(source / name, folder / name)
        return store.finish(folder, f"{TOKENIZER_DIR}/")


def _recorded(builder: "StageBuilder", todo: ExportPlan, store: EngineStore) -> dict[str, str]:
    """Write recorded calls for `nsp verify` to the staging folder; return {path: SHA-256}."""
    from nsp.export.proof.kept import kept

    with store.new_folder() as folder:
        recordings = kept(builder.reference.smallest_first())
        write_recorded(recordings, folder, model_hash=todo.model_hash)
        return store.finish(folder, f"{RECORDED_DIR}/")


def _costs(builder: "StageBuilder | None", todo: ExportPlan, store: EngineStore) -> dict[str, Any]:
    """Return what the stages cost: as before if the model is the same, otherwise counted now."""
    old = store.previous
    model = (todo.model_hash, dict(todo.record.config))
    known = old.costs if old is not None and (old.model_hash, old.config) == model else {}
    return known if known or builder is None else builder.costs()


def _check_space(todo: ExportPlan, folder: Path) -> None:
    """Raise ExportError when the disk has less free space than the planned builds need."""
    needed = sum(build.estimated_bytes for build in todo.builds if build.action == "build")
    # While an engine is compiled, its ONNX graph also exists.
    needed += max((b.estimated_bytes for b in todo.builds if b.profiles), default=0)
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()
    )
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ExportError(
            f"{folder}: this export needs about {_mib(needed)}, but {_mib(free)} of disk are free; "
            "free some or choose another --engine-dir"
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn errors of the operating system into an ExportError."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            problem = "the disk is full; free some space"
        else:
            problem = f"cannot be written ({error.strerror or error}); choose another --engine-dir"
        raise ExportError(f"{folder}: {problem} and export again; finished stages stay") from error


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


class _Progress:
    """Turns the progress of single builds into events with the fraction of the whole export."""

    def __init__(self, todo: ExportPlan, on_event: OnEvent) -> None:
        self._count, self._done, self._on_event = len(todo.builds), 0, on_event

    def report(self, build: PlannedBuild, phase: str, fraction: float, message: str) -> None:
        """Report that `fraction` of one build is done."""
        self._on_event(
            ExportEvent(
                stage=build.stage,
                target=build.target,
                precision=build.precision,
                phase=phase,
                fraction=min(1.0, (self._done + fraction) / self._count),
                message=message,
            )
        )

    def finish(self, build: PlannedBuild) -> None:
        """Count a build as done."""
        self._done += 1

    def done(self, message: str) -> None:
        """Report the end."""
        logger.info("%s", message)
        self._on_event(
            ExportEvent(
                stage="", target="", precision="", phase="done", fraction=1.0, message=message
            )
        )
