"""Child processes that run this same package, whatever the current folder contains."""

import os
from collections.abc import Mapping
from pathlib import Path


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment with `changes`, so that children import this package.

    Run them as `[sys.executable, "-P", "-m", "nsp…"]`: -P keeps the current folder off their path.
    """
    root = str(Path(__file__).absolute().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    path = root if not inherited else os.pathsep.join((root, inherited))
    return {**os.environ, **(changes or {}), "PYTHONPATH": path}
