"""The record of a run's data, kept as data.json next to run.json: data is known by its content.

Data that moved is the same data. Data that changed makes another run, because the samples of a step
follow from the seed, the step and the set. Such a run continues only when the user asks for it, and
the record notes it.

    {"train": {...}, "held_out": {...} or null, "accepted": [{"steps": {...}, "change": "..."}]}
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsp.data.identity import describe_change
from nsp.errors import CheckpointError, ConfigError
from nsp.files import read_json, write_file
from nsp.training.folder import DATA_NAME
from nsp.training.run_pictures import Pictures

logger = logging.getLogger(__name__)

_PARTS = {"train": "", "held_out": "held out: "}


class DataRecord:
    """The record of the run in a folder, and how the present data differs from it."""

    def __init__(self, folder: Path, data: Pictures, *, resume: bool) -> None:
        """Read the record of a resumed run; raises CheckpointError when it is damaged."""
        self._path = folder / DATA_NAME
        held_out = None if data.held_out is None else data.held_out.identity()
        self._now: dict[str, Any] = {"train": data.train.identity(), "held_out": held_out}
        self._then = _read(self._path) if resume else None
        self.change = None if self._then is None else _change(self._then, self._now)

    def check(self, *, accept_changed_data: bool) -> None:
        """Raise ConfigError for changed data; if the change is accepted, log a warning instead."""
        if self.change is None:
            return
        folder = self._path.parent
        if not accept_changed_data:
            raise ConfigError(
                f"{folder}: the data (data.source) changed since the run began: {self.change}; "
                "restore it, start another run with --output-dir, or continue with the changed "
                "data with --accept-changed-data"
            )
        logger.warning("%s continues with other data than at its start: %s", folder, self.change)

    def write(self, steps: Mapping[str, int]) -> None:
        """Record the data used from now on; `steps` are the finished steps of each phase."""
        accepted = [] if self._then is None else list(self._then.get("accepted", []))
        if self.change is not None:
            accepted.append({"steps": dict(steps), "change": self.change})
        record = {**self._now, "accepted": accepted}
        if record == self._then:
            return
        if self._then is None and any(steps.values()):
            logger.info("%s had no record of its data; it is recorded now", self._path.parent)
        with write_file(self._path) as partial:
            partial.write_text(json.dumps(record) + "\n")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} {_damaged(str(error))}") from error
    if not (_is_identity(record.get("train")) and isinstance(record.get("accepted"), list)):
        raise CheckpointError(f"{path} {_damaged('it is not a record of data')}")
    if record.get("held_out") is not None and not _is_identity(record["held_out"]):
        raise CheckpointError(f"{path} {_damaged('it is not a record of data')}")
    return record


def _damaged(reason: str) -> str:
    return f"is damaged ({reason}); delete it to continue with the data as it is now"


def _is_identity(found: Any) -> bool:
    """Return whether this has the form that `nsp.data.identity` writes."""
    if not isinstance(found, dict):
        return False
    words, names = (found.get("kind"), found.get("digest")), found.get("names")
    if not all(isinstance(word, str) for word in words):
        return False
    return names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names))


def _change(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return what changed, in one clause; None when nothing did."""
    changes = []
    for part, label in _PARTS.items():
        old, new = then.get(part), now[part]
        if old is None or new is None:
            if old is not new:
                changes.append(f"held-out pictures were {'removed' if new is None else 'added'}")
        elif (change := describe_change(old, new)) is not None:
            changes.append(label + change)
    return "; ".join(changes) or None
