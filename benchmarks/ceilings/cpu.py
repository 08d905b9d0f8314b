"""What the numbers were measured on: the environment, and the ceilings of this machine in this run.

`python -m nsp.benchmarks.ceilings.cpu THREADS SIDE` prints the ceilings as JSON; `measure_ceilings`
runs it as a child, because NumPy's number of threads is fixed when NumPy is imported.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from nsp.benchmarks.ceilings.product import onnxruntime_product, product_gflop
from nsp.benchmarks.contest.processes import run_child
from nsp.config import Config
from nsp.console.doctor import examine
from nsp.cores import usable_cores

PACKAGES = (
    "nsp",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "torch",
    "transformers",
    "tensorrt-rtx-cu13",
    "tensorrt-cu13",
)
COPY_BYTES = 64 << 20  # beyond the last-level cache of most machines


@dataclass(frozen=True, kw_only=True)
class Environment(Config):
    """The machine and its software. Has no host or user name."""

    cpu: str
    logical_cores: int
    usable_cores: int  # physical ones, open to this process
    threads: int  # given to every contestant
    ram_gib: float
    gpu: str | None
    system: str
    python: str
    packages: dict[str, str]
    load_average: float  # over the last minute, when the benchmark began

    @classmethod
    def read(cls, *, threads: int) -> Self:
        """Return the environment of this process."""
        found = examine()
        gpu = found["gpu"]
        return cls(
            cpu=found["cpu"],
            logical_cores=os.cpu_count() or 1,
            usable_cores=usable_cores(),
            threads=threads,
            ram_gib=found["ram_gib"],
            gpu=gpu["name"] if gpu else None,
            system=found["os"],
            python=found["python"],
            packages=_installed(),
            load_average=round(os.getloadavg()[0], 2),
        )


def _installed() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class OtherWork:
    """Counts the processor time that others take from now on: the noise of a measurement."""

    def __init__(self) -> None:
        self._start = self._clocks()

    def cores(self) -> float | None:
        """Return how many cores all other processes kept busy on average, None where unknown."""
        now = self._clocks()
        if self._start is None or now is None:
            return None
        seconds, busy_s, own_s = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, busy_s - own_s) / seconds if seconds else None

    @staticmethod
    def _clocks() -> tuple[float, float, float] | None:
        """Return seconds of wall time, of work by all processors, and of our own."""
        try:
            line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
        except OSError:
            return None
        # user nice system idle iowait irq softirq steal, in ticks
        ticks = [int(word) for word in line.split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()


@dataclass(frozen=True, kw_only=True)
class Ceilings(Config):
    """The most this machine was seen to do, with the same number of threads as the contestants."""

    threads: int
    gemm_side: int  # of the square float32 matrices
    gemm_gflops: dict[str, tuple[float, ...]]  # library -> best of each measurement
    copy_gb_s: tuple[float, ...]  # read plus written, best of each measurement

    @property
    def gemm_peak_gflops(self) -> float:
        """Best rate of any library: the ceiling of compute in float32."""
        return max(max(rates) for rates in self.gemm_gflops.values())

    @property
    def bandwidth_gb_s(self) -> float:
        """Best rate of a copy: the ceiling of memory traffic."""
        return max(self.copy_gb_s)

    @property
    def drift(self) -> float:
        """Largest change between measurements of one library, as a fraction of the larger."""
        rates = [*self.gemm_gflops.values(), self.copy_gb_s]
        return max(1 - min(each) / max(each) for each in rates)

    def joined(self, other: Self) -> "Ceilings":
        """Return both measurements as one, in order."""
        gemm = {
            name: self.gemm_gflops.get(name, ()) + other.gemm_gflops.get(name, ())
            for name in self.gemm_gflops | other.gemm_gflops
        }
        return Ceilings(
            threads=self.threads,
            gemm_side=self.gemm_side,
            gemm_gflops=gemm,
            copy_gb_s=self.copy_gb_s + other.copy_gb_s,
        )


def measure_ceilings(*, threads: int, gemm_side: int) -> Ceilings:
    """Return the ceilings, measured in a fresh process. Takes about a second."""
    return Ceilings.from_dict(
        run_child("nsp.benchmarks.ceilings.cpu", [str(threads), str(gemm_side)], threads=threads)
    )


def _ceilings(threads: int, side: int) -> Ceilings:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((side, side), np.float32) for _ in range(2))
    out = np.empty_like(a)
    products: dict[str, Callable[[], Any]] = {"numpy": lambda: np.matmul(a, b, out=out)}
    if (product := onnxruntime_product(a, b, threads=threads)) is not None:
        products["onnxruntime"] = product
    source = np.ones(COPY_BYTES // 4, np.float32)
    target = np.empty_like(source)
    copy_s = _best_seconds(lambda: np.copyto(target, source))
    return Ceilings(
        threads=threads,
        gemm_side=side,
        gemm_gflops={
            name: (product_gflop(side) / _best_seconds(product),)
            for name, product in products.items()
        },
        copy_gb_s=(2e-9 * source.nbytes / copy_s,),
    )


def _best_seconds(work: Callable[[], Any], *, repeats: int = 6) -> float:
    """Return the shortest of several runs, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    json.dump(_ceilings(int(sys.argv[1]), int(sys.argv[2])).to_dict(), sys.stdout)
