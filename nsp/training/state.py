"""state.pt: what a phase needs to go on, and what can be wrong with the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nsp.errors import CheckpointError
from nsp.files import write_file
from nsp.training.config import PhaseConfig

_TYPES = {"config": str, "step": int, "trained": dict, "optimizer": dict, "average": dict | None}


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a phase's state; after an error the file that was there before is as it was."""
    try:
        with write_file(path) as partial:
            torch.save(dict(state), partial)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif "inline_container" in str(error):
            # How torch's archive writer reports that a write fell short.
            reason = "the disk may be full"
        else:
            raise
        raise CheckpointError(
            f"{path} cannot be written ({reason}); free some space and continue with --resume"
        ) from error


def read_state(path: Path) -> tuple[PhaseConfig, dict[str, Any]]:
    """Return whose state a file holds, and the state.

    Raises CheckpointError when the file is damaged or of another origin.
    """
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if not all(isinstance(state[name], kind) for name, kind in _TYPES.items()):
                raise TypeError("a value is of the wrong type")
            return PhaseConfig.from_dict(json.loads(state["config"])), state
        except Exception as error:  # arbitrary bytes: what torch raises has no common base
            # Its messages advise to load without weights_only, which would run what is in the file.
            raise CheckpointError(
                f"{path} is damaged or was not written by train.py; restore a copy of it, or "
                "delete it to start this phase again"
            ) from error
