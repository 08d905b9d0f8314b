"""The saved steps from which a phase continues: the last few and the best, each complete.

    <phase>/checkpoints/step00000250/state.pt      weights, average, optimizer, position
                                    /about.json    step, loss, configuration, SHA-256 of state.pt

A step is written to a temporary folder, read back, then renamed. If the process is killed at any
moment, the steps saved before remain.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsp.errors import CheckpointError, ConfigError
from nsp.family.recipe import PhaseConfig
from nsp.files import file_sha256, name_failed_write, read_json, write_folder

logger = logging.getLogger(__name__)

STATE_NAME = "state.pt"
ABOUT_NAME = "about.json"


@dataclass(frozen=True)
class SavedStep:
    """What about.json says about one saved step."""

    folder: Path
    step: int
    loss: float | None  # used to choose the best step; None: it was not measured
    sha256: str
    config: PhaseConfig

    @property
    def state_file(self) -> Path:
        """The file with the tensors."""
        return self.folder / STATE_NAME


class CheckpointStore:
    """The saved steps of one phase; `copy` is the folder for a second copy, where all are kept."""

    def __init__(self, folder: Path, *, keep_last: int, copy: Path | None = None) -> None:
        self.folder, self.keep_last, self.copy = folder, keep_last, copy

    def save(
        self, step: int, state: Mapping[str, Any], *, config: PhaseConfig, loss: float | None
    ) -> None:
        """Save a step, then delete those that are neither among the last nor the best.

        Raises CheckpointError when it cannot be written; earlier steps stay.
        """
        target = self._path(step)
        try:
            with write_folder(target) as partial, name_failed_write(target, partial):
                file = partial / STATE_NAME
                torch.save(dict(state), file)
                _flush(file)
                about = {
                    "step": step,
                    "loss": loss,
                    "sha256": file_sha256(file),
                    "config": config.to_dict(),
                }
                if torch.load(file, mmap=True, weights_only=True)["step"] != step:
                    raise OSError(f"{file} does not read back as it was written")
                (partial / ABOUT_NAME).write_text(json.dumps(about, indent=1) + "\n")
        except (OSError, RuntimeError) as error:
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
            elif "inline_container" in str(error):
                # This is how torch's archive writer reports an incomplete write.
                reason = "the disk may be full"
            else:
                raise
            raise CheckpointError(
                f"{target} cannot be written ({reason}); free some space and continue with --resume"
            ) from error
        self._copy(target)
        self._prune()

    def _copy(self, saved: Path) -> None:
        """Write the second copy; a warning says why there is none, for the run can go on."""
        if self.copy is None:
            return
        try:
            with write_folder(self.copy / saved.name) as partial:
                shutil.copytree(saved, partial, dirs_exist_ok=True)
        except OSError as error:
            logger.warning("no second copy of %s: %s", saved, error)

    def load(self) -> tuple[SavedStep, dict[str, Any]] | None:
        """Return the newest undamaged step with its state; None when nothing is saved.

        A warning names a damaged step, and the step before it is used. Raises CheckpointError when
        all are damaged.
        """
        folders = self._folders()
        for folder in reversed(folders):
            try:
                saved = _about(folder)
                return saved, _read_state(saved)
            except CheckpointError as error:
                logger.warning("%s; using the step saved before it", error)
        if folders:
            raise CheckpointError(
                f"{self.folder} has no usable step: all {len(folders)} are damaged; restore a "
                "copy of one, or delete the folder to start this phase again"
            )
        return None

    def num_bytes(self) -> int:
        """Return the number of bytes of the saved steps."""
        return sum(file.stat().st_size for file in self.folder.glob("step*/*"))

    def _path(self, step: int) -> Path:
        return self.folder / f"step{step:08d}"

    def _folders(self) -> list[Path]:
        """Return the folders of saved steps, oldest first, without a step being written."""
        return sorted(path for path in self.folder.glob("step*") if path.is_dir())

    def _prune(self) -> None:
        """Keep the last few and the one of lowest loss; delete remains of interrupted saves."""
        for left in self.folder.glob(".step*"):
            shutil.rmtree(left, ignore_errors=True)
        saved = list(_readable(self._folders()))
        measured = [each for each in saved if each.loss is not None]
        kept = {each.folder for each in saved[-self.keep_last :]}
        if measured:
            kept.add(min(measured, key=lambda each: each.loss or 0.0).folder)
        for each in saved:
            if each.folder not in kept:
                # Renamed first, so that a half-removed folder has a hidden name.
                gone = each.folder.with_name(f".{each.folder.name}.gone")
                os.rename(each.folder, gone)
                shutil.rmtree(gone, ignore_errors=True)


def _flush(file: Path) -> None:
    """Wait until a file is on the disk: a power cut must not leave a name without its content."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def _readable(folders: list[Path]) -> Iterator[SavedStep]:
    for folder in folders:
        try:
            yield _about(folder)
        except CheckpointError:
            continue  # `load` reports it


def _about(folder: Path) -> SavedStep:
    """Return the description of a saved step; raise CheckpointError when it is damaged."""
    path = folder / ABOUT_NAME
    try:
        values = read_json(path)
        loss = values["loss"]
        if folder.name != f"step{int(values['step']):08d}":
            raise ValueError(
                f"it belongs to step {values['step']}, but its folder has another name"
            )
        return SavedStep(
            folder=folder,
            step=int(values["step"]),
            loss=None if loss is None else float(loss),
            sha256=str(values["sha256"]),
            config=PhaseConfig.from_dict(values["config"]),
        )
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())})") from error


def _read_state(saved: SavedStep) -> dict[str, Any]:
    """Return the state of a saved step; raise CheckpointError when it changed since."""
    path = saved.state_file
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if file_sha256(path) != saved.sha256:
        raise CheckpointError(f"{path} is truncated or damaged (SHA-256)")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for arbitrary bytes, torch raises errors without a common base
        # Its messages advise to load without weights_only, which would run code from the file.
        raise CheckpointError(f"{path} is damaged or was not written by train.py") from error
    if not isinstance(state, dict) or state.get("step") != saved.step:
        raise CheckpointError(f"{path} belongs to another step than its folder's name says")
    return state
