"""One engine from one graph, compiled in a child process: a crash there takes nothing with it."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.plan import PlannedBuild
from export.targets import TARGETS
from nsp.errors import ExportError

logger = logging.getLogger(__name__)

ENGINE_NAME = "engine.plan"
_CHILD = "export.build_child"


@dataclass(frozen=True)
class Engine:
    """What a build gave besides the file."""

    device: dict[str, str] = field(default_factory=dict)  # what it was built for, in words
    peak_mib: float = 0.0  # of the compiler's process


def build_engine(
    build: PlannedBuild,
    model: Path,
    plan: Path,
    *,
    timeout_s: float,
    on_progress: Callable[[float, str], None],
    child: str = _CHILD,
) -> Engine:
    """Compile the graph `model` to the engine `plan`.

    Raises ExportError with one line for a refused graph, a crash, a timeout or too little memory.
    """
    job = {
        "module": TARGETS[build.target].runtime.module,
        "model": str(model),
        "plan": str(plan),
        "profiles": list(build.profiles),
        "gpu_archs": list(build.gpu_archs),
    }
    label = f"{build.stage} ({build.target} {build.precision})"
    outcome = _run_child(job, label, timeout_s, on_progress, child)
    if error := outcome.get("error"):
        raise ExportError(f"{label}: {error}")
    logger.info(
        "%s: engine of %.1f MiB, %.1f s, peak memory %.0f MiB",
        label,
        plan.stat().st_size / 2**20,
        outcome["seconds"],
        outcome["peak_mib"],
    )
    return Engine(outcome["device"], outcome["peak_mib"])


def _run_child(
    job: dict[str, Any],
    label: str,
    timeout_s: float,
    on_progress: Callable[[float, str], None],
    child: str,
) -> dict[str, Any]:
    """Return the child's result; raise ExportError when it ends without one."""
    with tempfile.TemporaryDirectory(prefix="nsp-build-") as scratch:
        job_file, log_file = Path(scratch, "job.json"), Path(scratch, "log.txt")
        job_file.write_text(json.dumps(job))
        with log_file.open("wb") as log, _started(child, job_file, log) as process:
            killer = threading.Timer(timeout_s, process.kill)
            killer.start()
            outcome: dict[str, Any] = {}
            try:
                for message in _messages(process):
                    if "progress" in message:
                        on_progress(message["progress"], message["phase"])
                    outcome |= message
                code = process.wait()
            finally:
                timed_out = killer.finished.is_set()
                killer.cancel()
        if "device" in outcome or "error" in outcome:
            return outcome
        raise ExportError(f"{label}: {_cause(code, timed_out, timeout_s)}{_last_line(log_file)}")


@contextmanager
def _started(child: str, job_file: Path, log: Any) -> Iterator[subprocess.Popen[str]]:
    """Yield the running child; it does not outlive the block."""
    # The child imports this very package, whatever the current folder holds.
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", child, str(job_file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _messages(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects the child writes, one a line; the rest is TensorRT's own talk."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                logger.debug("build: %s", line.rstrip())


def _cause(code: int, timed_out: bool, timeout_s: float) -> str:
    """Return why a child ended without a result."""
    if timed_out:
        return f"the build took more than {timeout_s:g} s and was stopped; raise build_timeout_s"
    if code == -signal.SIGKILL:
        return "the build was killed, most likely for lack of memory; use a smaller --max-batch"
    if code < 0:
        name = signal.Signals(-code).name
        return f"the compiler crashed ({name}) on this graph; export with --target onnxruntime"
    return f"the build ended with exit code {code} and no result"


def _last_line(log: Path) -> str:
    """Return the last thing the child said on stderr, after a colon."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return f": {lines[-1].strip()[:300]}" if lines else ""
