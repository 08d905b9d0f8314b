"""What an error about an engine folder ends with: the command that makes its engines again."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsp.runtime.manifest import Manifest


def repair(
    folder: Path,
    manifest: "Manifest | None" = None,
    *,
    backend: str | None = None,
    precision: str | None = None,
) -> str:
    """Return the end of an error line: how to export `folder` again, from the same model.

    With the manifest at hand the command names the checkpoint and the precisions it tells of, those
    of `backend` only where one is given, and `precision` beside them. Without it the user is
    reminded to give the checkpoint: the default might be another model.
    """
    words = ["nsp", "export", "--engine-dir", str(folder)]
    if manifest is None:
        note = " (with the --checkpoint and precision of its first export)"
        return f"run: {shlex.join(words)}{note if folder.is_dir() else ''}"
    words += ["--checkpoint", _short(checkpoint_folder(folder, manifest))]
    if backend is not None:
        words += ["--target", backend.replace("_", "-")]
    variants = [v for vs in manifest.stages.values() for v in vs]
    wanted: set[str] = {v.precision for v in variants if backend in (None, v.backend)}
    if precision is not None:
        wanted |= {precision}
    elif backend is None and wanted != {"fp32"}:
        wanted -= {"fp32"}  # target "auto" adds it where it is of use
    words += [f"--{name}" for name in sorted(wanted)]
    return f"run: {shlex.join(words)}"


def checkpoint_folder(folder: Path, manifest: "Manifest") -> Path:
    """Return the checkpoint that the engines in `folder` were exported from; it may be gone."""
    return (folder / manifest.source).resolve()


def _short(path: Path) -> str:
    """Return a path inside the current folder relative to it, another one as it is."""
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)
