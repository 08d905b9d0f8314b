"""The engine folder as an export sees it: what is finished and what is in progress.

Work in progress lies in `.export/` beside its own manifest, in the final layout. The folder's
manifest and engines stay as they were until everything is built and checked; then folders are
moved, and the new manifest last of all. So an interruption loses nothing that was finished, and a
reader never sees a half-written stage.
"""

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nsp.errors import ConfigError, EngineError, ExportError
from nsp.files import write_folder
from nsp.runtime.manifest import (
    MANIFEST_NAME,
    PRECISION_DTYPES,
    STAGING_NAME,
    TOKENIZER_DIR,
    Manifest,
    Variant,
    check_files,
    read_manifest,
    write_manifest,
)

logger = logging.getLogger(__name__)

_VARIANT_FOLDER = re.compile(rf"[a-z_]+-({'|'.join(PRECISION_DTYPES)})")


class EngineStore:
    """One engine folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.staging = folder, folder / STAGING_NAME
        self.previous = _read(folder)
        self.staged = _read(self.staging)

    def check_is_ours(self, stages: Set[str]) -> None:
        """Raise ConfigError for a folder of something else, of which an export would replace parts.

        Without a readable manifest, what an export left is known by its variants' folders.
        """
        if self.previous is not None or self.staging.is_dir():
            return
        taken = {MANIFEST_NAME, TOKENIZER_DIR, *stages}
        held = sorted(name for name in taken if (self.folder / name).exists())
        variants = [path.name for name in stages for path in (self.folder / name).glob("*")]
        if held and not (variants and all(map(_VARIANT_FOLDER.fullmatch, variants))):
            raise ConfigError(
                f"{self.folder} holds {held[0]}, which no export wrote; choose another --engine-dir"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, with its staging folder; raise ExportError when another export does."""
        self.staging.mkdir(parents=True, exist_ok=True)
        with (self.staging / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ExportError(
                    f"another export is writing to {self.folder}; wait for it or choose another "
                    "--engine-dir"
                ) from error
            yield

    def intact(self, variant: Variant) -> bool:
        """Return whether all files of a variant are there with their recorded content."""
        return self._root(variant) is not None

    def path(self, variant: Variant) -> Path:
        """Return the file of a variant that is loaded, finished or in progress."""
        root = self._root(variant)
        name = next(iter(variant.files))
        if root is None:
            raise ExportError(f"{self.folder / name} changed while it was exported; export again")
        return root / name

    def _root(self, variant: Variant) -> Path | None:
        for root in (self.staging, self.folder):
            try:
                check_files(root, variant.files)
            except EngineError:
                continue
            return root
        return None

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """Yield an empty folder that becomes `name` in the staging folder if the block succeeds."""
        with write_folder(self.staging / name) as partial:
            yield partial

    def record(self, manifest: Manifest) -> None:
        """Remember what is finished so far."""
        write_manifest(self.staging, manifest)
        self.staged = manifest

    def publish(self, manifest: Manifest, shared: Mapping[str, Path]) -> None:
        """Move what is finished to its place, then the manifest, then drop what it does not name.

        `shared` are folders for all stages: {name in the engine folder: finished folder to move
        there}.
        """
        moves = {name: source for name, source in shared.items() if source.is_dir()}
        for name in sorted(_folders(manifest)):
            if (self.staging / name).is_dir():
                moves[name] = self.staging / name
        pending = self.staging / "new"
        write_manifest(pending, manifest)  # before anything moves: this is where a disk is full
        replaced = self.staging / "old"
        try:
            for name, source in moves.items():
                _swap(source, self.folder / name, replaced / name)
            os.replace(pending / MANIFEST_NAME, self.folder / MANIFEST_NAME)
        except BaseException:
            for name, source in reversed(moves.items()):
                _swap_back(source, self.folder / name, replaced / name)
            raise
        if self.previous is not None:
            for name in _folders(self.previous) - _folders(manifest):
                shutil.rmtree(self.folder / name, ignore_errors=True)
                _remove_empty(self.folder / Path(name).parent)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.previous, self.staged = manifest, None

    def abandon(self) -> None:
        """Remove the staging folder when nothing is finished in it."""
        if self.staged is None:
            shutil.rmtree(self.staging, ignore_errors=True)
            _remove_empty(self.folder)

    def kept(self, manifest: Manifest) -> dict[str, tuple[Variant, ...]]:
        """Return the variants of the last finished export that stand beside the new `manifest`.

        They are of the same model, of a backend and precision that this export does not make, and
        none of their files is replaced.
        """
        old = self.previous
        if old is None or old.model_hash != manifest.model_hash or old.config != manifest.config:
            return {}
        new = {(v.backend, v.precision) for vs in manifest.stages.values() for v in vs}
        digests = {n: d for vs in manifest.stages.values() for v in vs for n, d in v.files.items()}
        dropped = set(new)
        for variants in old.stages.values():
            for variant in variants:
                changed = any(digests.get(n, d) != d for n, d in variant.files.items())
                if changed:
                    dropped.add((variant.backend, variant.precision))
        for backend, precision in sorted(dropped - new):
            logger.info("dropping %s %s: it shares files that were rebuilt", backend, precision)
        return {
            stage: tuple(v for v in variants if (v.backend, v.precision) not in dropped)
            for stage, variants in old.stages.items()
        }


def with_variant(manifest: Manifest, stage: str, variant: Variant) -> Manifest:
    """Return the manifest with a variant, in place of one of the same backend and precision."""
    variants = {(v.backend, v.precision): v for v in manifest.stages.get(stage, ())}
    variants[variant.backend, variant.precision] = variant
    return replace(manifest, stages={**manifest.stages, stage: tuple(variants.values())})


def _read(folder: Path) -> Manifest | None:
    """Return a folder's manifest, or None when there is none that can be read."""
    try:
        return read_manifest(folder)
    except EngineError as error:
        if folder.name != STAGING_NAME and any(folder.glob("*.json")):
            logger.warning("%s; everything is exported again", error)
        return None


def _folders(manifest: Manifest) -> set[str]:
    """Return the folders that hold a manifest's stages."""
    files = (name for vs in manifest.stages.values() for v in vs for name in v.files)
    return {str(Path(name).parent) for name in files}


def _swap(source: Path, place: Path, old: Path) -> None:
    """Move `source` to `place`, and what was there to `old`."""
    shutil.rmtree(old, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        old.parent.mkdir(parents=True, exist_ok=True)
        os.rename(place, old)
    os.rename(source, place)


def _swap_back(source: Path, place: Path, old: Path) -> None:
    """Undo as much of `_swap` as was done."""
    if place.exists() and not source.exists():
        os.rename(place, source)
    if old.exists() and not place.exists():
        os.rename(old, place)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
