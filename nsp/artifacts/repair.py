"""The end of every error about an engine folder: the command that builds its engines again."""

import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from nsp.errors import CheckpointError, NspError

_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DEMO = Path(__file__).parents[1] / "demo"  # the bundled model


class _Variant(Protocol):
    """The parts of a manifest's variant that are needed here."""

    @property
    def backend(self) -> str:
        """The backend that runs it."""

    @property
    def precision(self) -> str:
        """The precision it was built in."""


class Exported(Protocol):
    """The parts of a manifest that are needed here; its own errors end with these commands."""

    @property
    def source(self) -> str:
        """The name of the checkpoint it was exported from."""

    @property
    def model_hash(self) -> str:
        """SHA-256 over the weights."""

    @property
    def stages(self) -> Mapping[str, tuple[_Variant, ...]]:
        """The variants of every stage."""


def repair(
    folder: Path,
    manifest: Exported | None = None,
    *,
    backend: str | None = None,
    precision: str | None = None,
) -> str:
    """Return the end of an error line: how to export `folder` again, from the same model.

    With a manifest, the command names the checkpoint, the precisions of the manifest and its
    backend, if there is only one. If `backend` is given, only its precisions are named, and also
    `precision`. Without a manifest the user is reminded to give the checkpoint, because the default
    may be another one.
    """
    if manifest is None:
        return _unknown(folder)
    variants = [v for vs in manifest.stages.values() for v in vs]
    if backend is None and len(held := {v.backend for v in variants}) == 1:
        backend = held.pop()
    wanted: set[str] = {v.precision for v in variants if backend in (None, v.backend)}
    if precision is not None:
        wanted |= {precision}
    return _command(folder, manifest.source, wanted, backend, drop_fp32=precision is None)


def repair_unread(folder: Path, values: Mapping[str, Any]) -> str:
    """Return the same for a manifest of another schema, from the values that can be read."""
    source, stages = values.get("source"), values.get("stages")
    if not isinstance(source, str) or not isinstance(stages, dict):
        return _unknown(folder)
    listed = [v for vs in stages.values() if isinstance(vs, list) for v in vs]
    variants = [v for v in listed if isinstance(v, dict)]
    found = [v.get("precision") for v in variants]
    held = {name for v in variants if isinstance(name := v.get("backend"), str)}
    backend = held.pop() if len(held) == 1 else None
    # Schema 1 had the path of the checkpoint, relative to the engine folder.
    path = (folder / source).resolve() if os.sep in source else Path(source)
    name = str(path) if path.is_dir() else source_name(path)
    return _command(folder, name, {p for p in _PRECISIONS if p in found}, backend, drop_fp32=True)


def _unknown(folder: Path) -> str:
    note = " (with the --checkpoint and precision of its first export)" if folder.is_dir() else ""
    return f"run: {shlex.join(['nsp', 'export', '--engine-dir', str(folder)])}{note}"


def _command(
    folder: Path, source: str, precisions: set[str], backend: str | None, *, drop_fp32: bool
) -> str:
    found = next(iter(source_candidates(folder, source)), None)
    checkpoint = _short(found) if found is not None else source
    words = ["nsp", "export", "--engine-dir", str(folder), "--checkpoint", checkpoint]
    if backend is not None:
        words += ["--target", backend.replace("_", "-")]
    elif drop_fp32 and precisions != {"fp32"}:
        precisions = precisions - {"fp32"}  # target "auto" adds it if it is useful
    words += [f"--{name}" for name in sorted(precisions)]
    return f"run: {shlex.join(words)}"


def source_name(checkpoint: Path) -> str:
    """Return the name of a checkpoint folder: its own, or that of the run around it.

    A manifest keeps this name and the model's hash, never a path of the machine that built it.
    """
    path = checkpoint.resolve()
    return path.parent.name if path.name == "checkpoint" and path.parent.name else path.name


def source_candidates(folder: Path, name: str) -> Iterable[Path]:
    """Yield checkpoint folders called `name` in the usual places.

    These are the package (its demo model), `runs`, `checkpoints`, and folders of that name, both in
    the current folder and next to the engine folder. The model hash shows whether it is the same.
    """
    from nsp.artifacts.checkpoint import is_checkpoint  # engines that are in order need no repair

    roots = [Path.cwd(), folder.absolute().parent]
    places = [root / part for root in dict.fromkeys(roots) for part in ("", "runs", "checkpoints")]
    found = [DEMO] if name == DEMO.name else []
    if name not in ("", ".", "..") and os.sep not in name and "\0" not in name:
        found += [p for place in places for p in (place / name, place / name / "checkpoint")]
    elif Path(name).is_absolute():
        found += [Path(name)]
    return (path for path in found if is_checkpoint(path))


def find_source(folder: Path, manifest: Exported) -> Path:
    """Return the checkpoint that the engines in `folder` were exported from, found by its hash.

    Raises CheckpointError if it is in none of the usual places.
    """
    from nsp.artifacts.checkpoint import read_checkpoint

    others = []
    for path in source_candidates(folder, manifest.source):
        try:
            if read_checkpoint(path).weights_hash() == manifest.model_hash:
                return path
            others.append(f"{path} has another model")
        except (NspError, OSError) as error:
            others.append(str(error))
    looked = f" ({'; '.join(others)})" if others else ""
    raise CheckpointError(
        f"the checkpoint {manifest.source} (model {manifest.model_hash[:12]}) is not in runs/, "
        f"checkpoints/ or next to {folder}{looked}; give it with --checkpoint"
    )


def _short(path: Path) -> str:
    """Return a path inside the current folder relative to it, and other paths unchanged."""
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)
