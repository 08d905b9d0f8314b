"""Cold start and peak memory: fresh processes that import, load and generate."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from nsp.benchmarks.ceilings.clock import torch_uses_gpu
from nsp.benchmarks.contest.contenders import Source
from nsp.benchmarks.contest.processes import ask_once
from nsp.benchmarks.record.cold import ColdRun

_POLL_S = 0.01  # of the GPU's memory


def cold_run(
    source: Source, request: Mapping[str, Any], *, batch: int, threads: int, device: str = "cpu"
) -> ColdRun:
    """Return what a fresh process measured; raise BackendError with its message when it fails."""
    job = {"source": source.to_dict(), "request": dict(request)}
    with _gpu_memory(device) as gpu_peak_mib:
        found = ask_once("nsp.benchmarks.contest.cold_program:answers", job, threads=threads)
    values = {"contender": source.label, "batch": batch, "gpu_peak_mib": None, **found}
    return ColdRun.from_dict({**values, **gpu_peak_mib})


@contextmanager
def _gpu_memory(device: str) -> Iterator[dict[str, float]]:
    """Yield what will hold `gpu_peak_mib` after the block: used on the GPU by whomever else."""
    found: dict[str, float] = {}
    if device != "cuda" or not torch_uses_gpu():
        yield found
        return
    import torch

    done, before = threading.Event(), torch.cuda.mem_get_info()[0] / 2**20
    with ThreadPoolExecutor(1) as pool:
        lowest = pool.submit(_least_free_mib, done)
        try:
            yield found
        finally:
            done.set()
        found["gpu_peak_mib"] = max(0.0, before - lowest.result())


def _least_free_mib(done: threading.Event) -> float:
    """Return the least memory that was free on the GPU until `done`, whoever used it."""
    import torch

    least = float("inf")
    while not done.wait(_POLL_S):
        least = min(least, torch.cuda.mem_get_info()[0] / 2**20)
    return least
