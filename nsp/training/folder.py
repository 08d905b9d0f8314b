"""The folder of a run: its content, and whether a command may begin or continue a run there."""

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsp.artifacts.checkpoint import CheckpointRecord, is_checkpoint, read_checkpoint
from nsp.config import Config
from nsp.errors import CheckpointError, ConfigError
from nsp.family.recipe import FREE_OF_PHASE, RunConfig, counted
from nsp.files import locked_file, read_json

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint"
RUN_NAME = "run.json"
DATA_NAME = "data.json"
START_NAME = "start"
TOKENS_NAME = "tokens.safetensors"
LORA_NAME = "lora"  # in a phase's folder: its adapters alone
LOCK_NAME = ".lock"
# What a resumed run may change: its length, how it is computed, and what it saves.
_FREE = (
    "precision",
    "parallel",
    "compile",
    "activation_checkpointing",
    "anyway",
    "tracking",
    "copy_dir",
    "data.num_workers",
)
# Paths. The identity of what they lead to is checked by content: data.json, the key of cached
# tokens, and start/, the copy of the first model.
_PLACES = ("data.source", "data.validation", "data.heldout", "data.token_cache", "start_from")


def newest_model(folder: Path) -> CheckpointRecord:
    """Return the model that a phase of the run in `folder` starts from.

    If checkpoint/ is damaged, a warning names it; the phases' saved steps create it again.
    """
    checkpoint = folder / CHECKPOINT_NAME
    if is_checkpoint(checkpoint):
        try:
            record = read_checkpoint(checkpoint)
            _ = record.digests  # checks all its files, also those that are read later
            return record
        except CheckpointError as error:
            logger.warning("%s; creating it again from the saved steps", error)
    return read_checkpoint(folder / START_NAME)


def steps_folder(run: RunConfig, phase_folder: Path) -> Path:
    """Return the folder of a phase's saved steps."""
    if run.checkpoint_dir is None:
        return phase_folder / "checkpoints"
    return Path(run.checkpoint_dir) / phase_folder.name


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder; ConfigError when another process trains in it.

    If no run begins in it, the folder stays as it was.
    """
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    with locked_file(path) as held:
        if not held:
            raise ConfigError(
                f"another process trains in {folder}; wait for it or choose another --output-dir"
            )
        try:
            yield
        finally:
            if not (folder / RUN_NAME).exists():
                path.unlink(missing_ok=True)
                if not existed and not any(folder.iterdir()):
                    folder.rmdir()


def check_folder(folder: Path, config: RunConfig, *, resume: bool) -> None:
    """Raise when `folder` does (not) hold a run, or one that `config` does not continue.

    A run without any saved step counts as none: a new start replaces it.
    """
    path = folder / RUN_NAME
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; choose another --output-dir")
    failed = None if resume else failed_start(folder)
    if path.exists() and not resume and failed is None:
        raise ConfigError(
            f"{folder} already has a run; continue it with --resume or choose another --output-dir"
        )
    if not resume:
        replaced = () if failed is None else [phase.name for phase in failed.phases]
        for name in (CHECKPOINT_NAME, *(phase.name for phase in config.phases)):
            if (folder / name).exists() and name not in replaced:
                raise ConfigError(
                    f"{folder} has {name}/ but no {RUN_NAME}; choose another --output-dir"
                )
        for phase in config.phases:
            steps = steps_folder(config, folder / phase.name)
            if steps.is_dir() and any(steps.iterdir()):
                raise ConfigError(
                    f"{steps} has another run's saved steps; continue that run with --resume, or "
                    "choose another --checkpoint-dir"
                )
        return
    if not path.exists():
        raise CheckpointError(f"{folder} has no run to resume; to start one, omit --resume")
    stored = stored_run(folder)
    then, now = ([phase.name for phase in run.phases] for run in (stored, config))
    if then != now:
        raise ConfigError(
            f"{path} has the phases {', '.join(then)}, not {', '.join(now)}; omit the option that "
            "changes them to continue that run, or start another with --output-dir"
        )
    knows_data = (folder / DATA_NAME).exists()
    for name, was, given in differences(stored, config):
        if given is None and name.endswith((".steps", ".epochs")):
            continue  # a length is one of the two keys; the other one is reported
        if _is_free(name) or (name in _PLACES and knows_data):
            logger.info("%s: %s is now %r; it was %r", folder, name, given, was)
        else:
            raise ConfigError(
                f"{path} says {name} is {was!r}, not {given!r}; omit the option that changes it to "
                "continue that run, or start another with --output-dir"
            )


def failed_start(folder: Path) -> RunConfig | None:
    """Return the run in `folder` if none of its steps is saved; a new start may replace it."""
    if not (folder / RUN_NAME).is_file() or (folder / CHECKPOINT_NAME).exists():
        return None
    try:
        run = stored_run(folder)
    except CheckpointError:
        return None
    for phase in run.phases:
        own = folder / phase.name
        steps = steps_folder(run, own)
        # Saved steps that lie elsewhere may be out of sight now.
        if (steps.is_dir() and any(steps.iterdir())) or (
            run.checkpoint_dir is not None and own.exists()
        ):
            return None
    return run


def check_order(folder: Path, config: RunConfig) -> None:
    """Raise when an earlier phase would continue although a later one was trained on its result.

    The lengths of the phases are in steps.
    """
    made = newest_model(folder).notes.get("steps", {})
    for phase, later in itertools.pairwise(config.phases):
        if 0 < made.get(phase.name, 0) < counted(phase.steps) and (folder / later.name).exists():
            raise ConfigError(
                f"{folder}: {later.name} was trained on {phase.name} after "
                f"{made[phase.name]} steps, but {phase.steps} are requested now; delete "
                f"{folder / later.name} to train it again afterwards, or train it further in a new "
                f"run: --start-from {folder / CHECKPOINT_NAME} --from-phase {later.name} "
                "--output-dir FOLDER"
            )


def _is_free(name: str) -> bool:
    """Return whether a resumed run may change the field `name`, such as "phases.0.steps"."""
    parts = name.split(".")
    of_phase = (*FREE_OF_PHASE, "epochs")  # a length is one of `steps` and `epochs`
    return name in _FREE or parts[0] in _FREE or (parts[0] == "phases" and parts[2] in of_phase)


def stored_run(folder: Path) -> RunConfig:
    """Return the configuration of the run in `folder`; raise CheckpointError when it is damaged."""
    path = folder / RUN_NAME
    try:
        return RunConfig.from_dict(read_json(path))
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); start another run with --output-dir"
        ) from error


def without_places(values: Any) -> Any:
    """Return a configuration with only the names of files and folders, not their absolute paths.

    A checkpoint may be published; the paths on the machine that trained it should not be.
    """
    if isinstance(values, dict):
        return {name: without_places(value) for name, value in values.items()}
    if isinstance(values, list):
        return [without_places(value) for value in values]
    if not isinstance(values, str):
        return values
    prefix = "hf:" if values.startswith("hf:") else ""
    path = values.removeprefix(prefix)
    return prefix + os.path.basename(path.rstrip("/")) if os.path.isabs(path) else values


def differences(stored: Config, given: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name and both values of each field in which two configurations differ."""
    yield from differing_values(stored.to_dict(), given.to_dict())


def differing_values(stored: Any, given: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name and both values of each key in which two dictionaries differ."""
    yield from _different("", stored, given)


def _different(name: str, stored: Any, given: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*stored, *(key for key in given if key not in stored)]:
            yield from _different(f"{name}.{key}", stored.get(key), given.get(key))
    elif isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        for index, pair in enumerate(zip(stored, given, strict=True)):
            yield from _different(f"{name}.{index}", *pair)
    elif stored != given:
        yield name.removeprefix("."), stored, given
