"""Checks before a run writes anything: links are refused, leftovers are removed.

A training that was killed leaves half-written files and folders with hidden names, each as large as
a copy of all weights. While this process has the lock, nobody else can be writing them.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from nsp.errors import ConfigError
from nsp.family.recipe import RunConfig
from nsp.training.folder import (
    CHECKPOINT_NAME,
    DATA_NAME,
    LOCK_NAME,
    RUN_NAME,
    START_NAME,
    TOKENS_NAME,
    failed_start,
    steps_folder,
)

logger = logging.getLogger(__name__)

# Names given by `files.write_folder` and `files.write_file` (present and earlier forms), and by
# `CheckpointStore`.
_FOLDER = re.compile(r"\.(?P<name>[^.].*)\.[a-z0-9_]{8}(?P<old>\.old)?|\.step\d+\.gone")
_FILE = re.compile(r"\..+\.(?:[0-9a-f]{8}|\d+)\.partial")
MLFLOW_NAME = "mlflow.json"
_OURS = (CHECKPOINT_NAME, START_NAME, RUN_NAME, DATA_NAME, TOKENS_NAME, LOCK_NAME)


def refuse_links(folder: Path, config: RunConfig) -> None:
    """Raise ConfigError if a file or folder that a run would write is a link to somewhere else.

    The path of the run folder itself may contain links, and so may that of --checkpoint-dir.
    """
    names = [*_OURS, MLFLOW_NAME, config.tracking.log_name, *(p.name for p in config.phases)]
    found = [folder / name for name in names]
    for phase in config.phases:
        found += _entries(folder / phase.name)
    for path in found:
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link, and a run does not write through links in its folder; put the "
                "file or folder itself there (saved steps may be elsewhere: --checkpoint-dir)"
            )


def remove_failed_start(folder: Path) -> None:
    """Remove a run without any saved step, so that a new one begins; other runs stay."""
    run = failed_start(folder)
    if run is None:
        return
    logger.info("%s: its run has no saved step; a new one replaces it", folder)
    for name in (START_NAME, *(phase.name for phase in run.phases)):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for name in (DATA_NAME, TOKENS_NAME, MLFLOW_NAME, RUN_NAME):  # the last makes it a run
        (folder / name).unlink(missing_ok=True)


def remove_leftovers(folder: Path, config: RunConfig) -> None:
    """Remove what killed trainings left in a run's folder and next to its saved steps."""
    places = [folder]
    for phase in config.phases:
        own = folder / phase.name
        places += [own, own / "samples", steps_folder(config, own)]
    for path in [path for place in dict.fromkeys(places) for path in _entries(place)]:
        if path.is_symlink():
            continue
        whole = _FOLDER.fullmatch(path.name) if path.is_dir() else None
        if whole is not None and whole["old"] and not (path.parent / whole["name"]).exists():
            os.rename(path, path.parent / whole["name"])  # killed between two renames
        elif whole is not None:
            shutil.rmtree(path, ignore_errors=True)
            logger.info("%s: removed; a training that was killed had left it", path)
        elif path.is_file() and _FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _entries(folder: Path) -> Iterator[Path]:
    if folder.is_symlink() or not folder.is_dir():
        return
    yield from sorted(folder.iterdir())
