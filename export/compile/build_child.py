"""The child process of an engine build: `python -m nsp.export.compile.build_child JOB.json`.

Progress and the result go to stdout as JSON, one object per line. The build is stopped when stdin
ends, because the parent closed it or died. Imports neither torch nor onnxruntime.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nsp.errors import NspError
from nsp.export.compile.trt_builder import compile_engine


def main(job_file: str) -> int:
    """Run one job and report it; return the exit status."""
    job = json.loads(Path(job_file).read_text())
    stop = _stop_request()
    started = time.monotonic()
    # Polygraphy reads it when compile_engine imports it.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(job["module"] == "tensorrt_rtx"))
    try:
        device = compile_engine(
            module=job["module"],
            model=Path(job["model"]),
            plan=Path(job["plan"]),
            profiles=job["profiles"],
            gpu_archs=job["gpu_archs"],
            timing_cache=Path(job["timing_cache"]) if job["timing_cache"] else None,
            on_progress=lambda done, phase: _say({"progress": done, "phase": phase}),
            should_stop=stop.is_set,
        )
    except (NspError, OSError, MemoryError) as error:
        _say({"error": str(error) or type(error).__name__})
        return 1
    seconds = time.monotonic() - started
    _say({"device": device, "seconds": seconds, "peak_mib": _peak_mib()})
    return 0


def _stop_request() -> threading.Event:
    """Return an event that is set when stdin ends.

    A signal handler would have to wait for the compiler, which blocks the main thread.
    """
    stop = threading.Event()

    def wait() -> None:
        while os.read(0, 1):
            pass
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    return stop


def _peak_mib() -> float:
    """Return this process's peak memory; `getrusage` would count its parent's before the exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
