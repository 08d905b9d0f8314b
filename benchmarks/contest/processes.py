"""Fresh processes: what must not be measured in a process that already did something else."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from nsp import child
from nsp.errors import BackendError

TIMEOUT_S = 900
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def run_child(module: str, arguments: Sequence[str], *, threads: int) -> dict[str, Any]:
    """Return the JSON object that `python -m module` prints, run with `threads` threads.

    Raises BackendError with the child's last line when it fails, or runs longer than 15 minutes.
    """
    command = [sys.executable, "-P", "-m", module, *arguments]
    try:
        done = subprocess.run(
            command,
            env=environment(threads),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(
            f"{module} did not finish within {TIMEOUT_S} s in its own process"
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BackendError(f"{module} failed in its own process: {lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a child that computes with so many threads."""
    return child.environment(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
