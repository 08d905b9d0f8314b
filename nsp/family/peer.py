"""Public code of others for a family's kind of model, which `nsp bench` can time beside ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A program around a clone of the code; it runs in a process of its own."""

    name: str  # what tables call it
    address: str  # of the repository to clone
    files: tuple[str, ...]  # what a clone has
    # "module:generator". It gets jobs and yields an answer to each. The first job is that of `job`
    # with `path` and `threads`, and its answer has `what` in words. Every other job has `batch` and
    # `seed`; its answer has `wall_ms`, to uint8 pixels, and `loop_ms`, of all steps.
    program: str
    # From the family's own configuration and sampling settings, whose types a caller cannot know.
    job: Callable[[Any, Any], Mapping[str, object]]

    def is_clone(self, path: Path) -> bool:
        """Return whether the folder has the files."""
        return all((path / name).is_file() for name in self.files)

    def check(self, path: Path) -> None:
        """Raise ConfigError for a folder that is not a clone of the code."""
        missing = [name for name in self.files if not (path / name).is_file()]
        if missing:
            raise ConfigError(
                f"--peer {path} has no {missing[0]}; clone {self.address} and give that folder"
            )
