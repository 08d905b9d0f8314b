"""Cold start and peak memory: fresh processes that import, load and generate."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsp.benchmarks.contest.processes import run_child
from nsp.config import Config


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a fresh process loads: the arguments of `load_pipeline`."""

    name: str  # of the contestant
    path: Path
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ColdRun(Config):
    """One fresh process. Moments are ms since its creation; files may be in the page cache.

    Memory is resident memory in MiB, shared libraries included.
    """

    contestant: str
    batch: int
    python_ms: float  # the interpreter runs
    imported_ms: float  # nsp.pipeline is imported, its backend's library not yet
    loaded_ms: float  # the pipeline is loaded
    first_step_ms: float  # the first scale step is done
    image_ms: float  # the images are decoded
    stage_ms: dict[str, float]  # the first call of every stage, waiting for its session included
    stage_mib: dict[str, float]  # resident memory right after it
    imported_mib: float  # the process's own: interpreter, nsp, the backend's library
    loaded_mib: float
    peak_mib: float
    torch_imported: bool

    def stage_growth_mib(self, stage: str) -> float:
        """Return by how much memory grew from the end of the stage before to that of `stage`."""
        names = list(self.stage_mib)
        index = names.index(stage)
        before = self.stage_mib[names[index - 1]] if index else self.loaded_mib
        return self.stage_mib[stage] - before

    @property
    def first_call_ms(self) -> float:
        """Time of the first generate call, from loaded to image."""
        return self.image_ms - self.loaded_ms


def cold_run(source: Source, request: Mapping[str, Any], *, batch: int, threads: int) -> ColdRun:
    """Return what a fresh process measured; raise BackendError with its message when it fails."""
    job = {
        "started_ns": time.monotonic_ns(),
        "path": str(source.path),
        "backend": source.backend,
        "options": dict(source.options),
        "request": dict(request),
    }
    measured = run_child("nsp.benchmarks.contest.child", [json.dumps(job)], threads=threads)
    return ColdRun.from_dict({"contestant": source.name, "batch": batch, **measured})
