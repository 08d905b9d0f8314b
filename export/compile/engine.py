"""Compiles one graph to an engine in a child process, so that a crash ends only the child.

Ctrl-C and the timeout ask the child to stop between two steps of the compiler, which keeps its
measurements, and kill it if it does not stop.
"""

import json
import logging
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsp.child import Child
from nsp.errors import ExportError
from nsp.export.plan import PlannedBuild
from nsp.export.targets import TARGETS

logger = logging.getLogger(__name__)

ENGINE_NAME = "engine.plan"
_CHILD = "nsp.export.compile.build_child"
_GRACE_S = 10.0  # time for a child to stop; TensorRT checks about every second


@dataclass(frozen=True)
class Engine:
    """The results of a build besides the file."""

    device: dict[str, str] = field(default_factory=dict)  # the machine it was built for, in words
    peak_mib: float = 0.0  # peak memory of the compiler's process


def build_engine(
    build: PlannedBuild,
    model: Path,
    plan: Path,
    *,
    timeout_s: float,
    on_progress: Callable[[float, str], None],
    timing_cache: Path | None = None,
    child: str = _CHILD,
) -> Engine:
    """Compile the graph `model` to the engine `plan`.

    `timing_cache` is the file for kernel times of a target that tries kernels. Raises ExportError
    with one line for a refused graph, a crash, a timeout or too little memory.
    """
    target = TARGETS[build.target]
    times_kernels = timing_cache is not None and target.times_kernels
    job = {
        "module": target.runtime.module,
        "model": str(model),
        "plan": str(plan),
        "profiles": list(build.profiles),
        "gpu_archs": list(build.gpu_archs),
        "timing_cache": str(timing_cache) if times_kernels else None,
    }
    label = f"{build.stage} ({build.target} {build.precision})"
    try:
        outcome = _run_child(job, label, timeout_s, on_progress, child)
    finally:
        if timing_cache is not None:  # remove what a child leaves if it is killed while writing
            for partial in timing_cache.parent.glob(f".{timing_cache.name}.*.partial"):
                partial.unlink(missing_ok=True)
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
        job_file = Path(scratch, "job.json")
        job_file.write_text(json.dumps(job))
        outcome: dict[str, Any] = {}
        with (
            Child(child, str(job_file), grace_s=_GRACE_S) as process,
            process.time_limit(timeout_s) as timed_out,
        ):
            for message in _messages(process.output):
                if "progress" in message:
                    on_progress(message["progress"], message["phase"])
                outcome |= message
            code = process.process.wait()
            last = process.last_words()[:300]
    if timed_out.is_set() and "device" not in outcome:
        raise ExportError(
            f"{label}: the build took more than {timeout_s:g} s and was stopped; "
            "raise --build-timeout"
        )
    if "device" in outcome or "error" in outcome:
        return outcome
    raise ExportError(f"{label}: {_cause(code, last)}" + (f": {last}" if last else ""))


def _messages(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects that the child writes, one per line; skip TensorRT's messages."""
    for line in lines:
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                logger.debug("build: %s", line.rstrip())


def _cause(code: int, last_words: str) -> str:
    """Return why a child ended without a result."""
    if code == -signal.SIGKILL or "bad_alloc" in last_words:
        return "the build was killed, most likely for lack of memory; use a smaller --max-batch"
    if code < 0:
        name = signal.Signals(-code).name
        return f"the compiler crashed ({name}) on this graph; export with --target onnxruntime"
    return f"the build ended with exit code {code} and no result"
