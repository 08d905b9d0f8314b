"""The engine folder during an export: finished engines and those in progress.

Work in progress is in `.export/`, with a manifest of the finished parts. Folders of files are named
by their content, so publishing adds new folders and then renames one new manifest over the old one:
before that rename readers get the old engines, after it the new ones, and a process killed at any
moment leaves one or the other. Folders that neither the new manifest nor the previous one names are
removed, unless a reader is loading from them.

Nothing is written, moved or removed through a link, and only folders with names of an export are
removed.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nsp.artifacts.engine_files import check_files, unused
from nsp.artifacts.manifest import (
    MANIFEST_NAME,
    PRECISION_DTYPES,
    RECORDED_DIR,
    STAGING_NAME,
    TOKENIZER_DIR,
    Manifest,
    Variant,
    content_folder,
    content_name,
    read_manifest,
    write_manifest,
)
from nsp.errors import ConfigError, EngineError, ExportError
from nsp.files import file_sha256, inside, locked_file, name_failed_write

logger = logging.getLogger(__name__)

TIMING_CACHE = "tensorrt.timing_cache"  # TensorRT's file in the engine folder, for later builds
_LOCK_NAME = "lock"
_BUILD_PREFIX = "build-"
# Files written by exports of schema 1; the first publish in their folder removes them.
_OLD_VARIANT = re.compile(rf"[a-z_]+-({'|'.join(PRECISION_DTYPES)})")
_OLD_FILES = {
    TOKENIZER_DIR: ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    RECORDED_DIR: ("calls.safetensors",),
}


class EngineStore:
    """One engine folder."""

    def __init__(self, folder: Path) -> None:
        """Read the finished parts; ConfigError for a link where an export would write."""
        self.folder, self.staging = folder, folder / STAGING_NAME
        self._check_links(STAGING_NAME, MANIFEST_NAME)
        self.previous = _read(folder)
        self.staged = _read(self.staging) if self.staging.is_dir() else None

    def _check_links(self, *names: str) -> None:
        for name in names:
            _inside(self.folder, name)

    def check_is_ours(self, stages: Set[str]) -> None:
        """Raise ConfigError for a folder with other content, which an export might replace.

        Without a readable manifest, the names of its variants' folders show an earlier export.
        Stage folders that are links are refused: their content is not ours.
        """
        taken = (TOKENIZER_DIR, RECORDED_DIR, *sorted(stages))
        self._check_links(*taken)
        if self.previous is not None or self.staging.is_dir():
            return
        held = [name for name in (MANIFEST_NAME, *taken) if (self.folder / name).exists()]
        variants = [path for name in stages for path in (self.folder / name).glob("*")]
        ours = content_folder(stages)
        known = (
            _OLD_VARIANT.fullmatch(path.name) or ours.fullmatch(f"{path.parent.name}/{path.name}")
            for path in variants
        )
        if held and not (variants and all(known)):
            raise ConfigError(
                f"{self.folder} has {held[0]}, which no export wrote; choose another --engine-dir"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder and its staging folder; raise ExportError if another export has it."""
        self.staging.mkdir(parents=True, exist_ok=True)
        with locked_file(self.staging / _LOCK_NAME) as held:
            if not held:
                raise ExportError(
                    f"another export is writing to {self.folder}; wait for it or choose another "
                    "--engine-dir"
                )
            if _read(self.folder) != self.previous:
                raise ExportError(f"another export to {self.folder} ended just now; export again")
            for path in self.staging.glob(f"{_BUILD_PREFIX}*"):  # left by a killed export
                shutil.rmtree(path, ignore_errors=True)
            yield

    def intact(self, variant: Variant) -> bool:
        """Return whether all files of a variant exist with their recorded content."""
        return self._root(variant.files) is not None

    def path(self, variant: Variant) -> Path:
        """Return the main file of a variant, finished or in progress."""
        root = self._root(variant.files)
        name = next(iter(variant.files))
        if root is None:
            raise ExportError(f"{self.folder / name} changed while it was exported; export again")
        return root / name

    def _root(self, digests: Mapping[str, str]) -> Path | None:
        for root in (self.staging, self.folder):
            try:
                check_files(root, digests)
            except EngineError:
                continue
            return root
        return None

    @contextmanager
    def new_folder(self) -> Iterator[Path]:
        """Yield an empty folder for a build; `finish` turns it into a finished one."""
        path = Path(tempfile.mkdtemp(prefix=_BUILD_PREFIX, dir=self.staging))
        try:
            with name_failed_write(self.folder, path):
                yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def finish(self, folder: Path, prefix: str, *, first: Sequence[str] = ()) -> dict[str, str]:
        """Rename a folder of `new_folder` to `prefix` and a digest of its content.

        Returns {path in the engine folder: SHA-256} of its files, beginning with `first`.
        """
        paths = sorted(folder.iterdir(), key=lambda path: (path.name not in first, path.name))
        digests = {path.name: file_sha256(path) for path in paths}
        name = prefix + content_name(digests)
        place = _inside(self.staging, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)  # perhaps damaged since it was finished
        folder.chmod(0o755)
        os.rename(folder, place)
        return {f"{name}/{file}": digest for file, digest in digests.items()}

    @property
    def timing_cache(self) -> Path:
        """The file in which TensorRT stores the times of kernels."""
        self._check_links(TIMING_CACHE)
        return self.folder / TIMING_CACHE

    def record(self, manifest: Manifest) -> None:
        """Record the parts finished so far, also those of an interrupted export before."""
        if self.staged is not None and self.staged.family == manifest.family:
            manifest = _with_finished(manifest, self.staged)
        write_manifest(self.staging, manifest)
        self.staged = manifest

    def publish(self, manifest: Manifest) -> None:
        """Move finished parts next to the published ones, then replace the manifest.

        The parts of the previous manifest stay for its present readers until the next publish.
        """
        for name, digests in _folders(manifest).items():
            self._place(name, digests)
        if manifest != self.previous:
            write_manifest(self.folder, manifest)
            before = [each for each in (manifest, self.previous) if each is not None]
            self._remove_unnamed(before)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.previous, self.staged = manifest, None

    def _place(self, name: str, digests: Mapping[str, str]) -> None:
        """Move a finished folder to its place, unless it is already there and complete."""
        source, place = self.staging / name, _inside(self.folder, name)
        if not source.is_dir():
            return
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, place)
            return
        try:
            check_files(self.folder, digests)
        except EngineError:
            for path in source.iterdir():  # one by one, so that readers always find every file
                os.replace(path, place / path.name)

    def _remove_unnamed(self, manifests: Sequence[Manifest]) -> None:
        """Remove folders of files that no manifest names and no reader is loading from."""
        kept = {name for manifest in manifests for name in _folders(manifest)}
        stages = {stage for manifest in manifests for stage in manifest.stages}
        ours = content_folder(stages)
        for owner in (*sorted(stages), TOKENIZER_DIR, RECORDED_DIR):
            root = self.folder / owner
            if root.is_symlink() or not root.is_dir():
                continue
            for path in list(root.iterdir()):
                name = f"{owner}/{path.name}"
                if path.is_file() and path.name in _OLD_FILES.get(owner, ()):
                    path.unlink()
                elif name not in kept and (
                    ours.fullmatch(name) or (owner in stages and _OLD_VARIANT.fullmatch(path.name))
                ):
                    _remove_unused(path)
            _remove_empty(root)

    def abandon(self) -> None:
        """Remove the staging folder when nothing is finished in it."""
        if self.staged is None:
            shutil.rmtree(self.staging, ignore_errors=True)
            _remove_empty(self.folder)

    def kept(self, manifest: Manifest) -> dict[str, tuple[Variant, ...]]:
        """Return the variants of the last finished export that stay in the new `manifest`.

        They belong to the same model, and to a backend and precision that this export does not
        make.
        """
        old = self.previous
        if old is None or old.model_hash != manifest.model_hash or old.config != manifest.config:
            return {}
        new = {(v.backend, v.precision) for vs in manifest.stages.values() for v in vs}
        return {
            stage: tuple(v for v in variants if (v.backend, v.precision) not in new)
            for stage, variants in old.stages.items()
        }


def _inside(folder: Path, name: str) -> Path:
    """Return folder / name; ConfigError if it is a link or behind one."""
    try:
        return inside(folder, name)
    except ValueError as error:
        raise ConfigError(f"{folder / name} {error}, or choose another --engine-dir") from None


def with_variant(manifest: Manifest, stage: str, variant: Variant) -> Manifest:
    """Return the manifest with a variant, which replaces one of the same backend and precision."""
    variants = {(v.backend, v.precision): v for v in manifest.stages.get(stage, ())}
    variants[variant.backend, variant.precision] = variant
    return replace(manifest, stages={**manifest.stages, stage: tuple(variants.values())})


def _with_finished(manifest: Manifest, staged: Manifest) -> Manifest:
    """Return the manifest with another one's variants after its own, also of other models."""
    stages = dict(manifest.stages)
    for stage, variants in staged.stages.items():
        own = stages.get(stage, ())
        known = {variant.fingerprint for variant in own}
        stages[stage] = (*own, *(v for v in variants if v.fingerprint not in known))
    return replace(manifest, stages=stages)


def _read(folder: Path) -> Manifest | None:
    """Return a folder's manifest, or None if it is missing or not readable."""
    try:
        return read_manifest(folder)
    except EngineError as error:
        if folder.name != STAGING_NAME and (folder / MANIFEST_NAME).exists():
            logger.warning("%s; exporting everything again", error)
        return None


def _folders(manifest: Manifest) -> dict[str, dict[str, str]]:
    """Return the folders of a manifest's files, each with its {path: SHA-256}."""
    listed = [manifest.files, manifest.recorded]
    listed += [variant.files for variants in manifest.stages.values() for variant in variants]
    folders: dict[str, dict[str, str]] = {}
    for digests in listed:
        for name, digest in digests.items():
            folders.setdefault(name.rpartition("/")[0], {})[name] = digest
    return folders


def _remove_unused(path: Path) -> None:
    """Remove a folder unless a reader has locked it; a later publish then removes it."""
    try:
        with unused(path) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)
    except OSError as error:  # not a folder, a link, or not readable: then it is not ours
        logger.warning("%s cannot be removed (%s)", path, error.strerror)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
