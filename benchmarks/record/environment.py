"""The machine and software that numbers were measured on, and what else the machine was doing."""

import importlib.metadata
import os
import re
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Self

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
# What decides the speed of products on a processor -> the flags of which it has one.
_INSTRUCTIONS = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni", "asimddp"},
    "BF16": {"avx512_bf16", "avx_ne_convert", "bf16"},
    "AMX": {"amx_tile"},
    "NEON": {"asimd"},
    "SVE": {"sve"},
    "I8MM": {"i8mm"},
}


def instructions(flags: Set[str]) -> str:
    """Return the kind of a processor from its flags, in words; "unknown" without a known one."""
    return ", ".join(kind for kind, names in _INSTRUCTIONS.items() if names & flags) or "unknown"


def processor_flags() -> set[str]:
    """Return the flags that Linux reports of the first processor; none elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


@dataclass(frozen=True, kw_only=True)
class Environment(Config):
    """The machine and its software. Has no host or user name."""

    cpu: str
    instructions: str | None = None  # kind of the processor; None: not recorded, before schema 4
    logical_cores: int
    usable_cores: int  # physical ones, open to this process
    threads: int  # given to every contender
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
            instructions=instructions(processor_flags()),
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
    """Counts the processor time that others take from now on: the noise of a measurement.

    `children` are processes that take part in the measurement, as this one does.
    """

    def __init__(self, children: Sequence[int] = ()) -> None:
        self._children = children
        self._start = self._clocks(children)

    def cores(self) -> float | None:
        """Return how many cores all other processes kept busy on average, None where unknown."""
        now = self._clocks(self._children)
        if self._start is None or now is None:
            return None
        seconds, busy_s, own_s = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, busy_s - own_s) / seconds if seconds else None

    @staticmethod
    def _clocks(children: Sequence[int]) -> tuple[float, float, float] | None:
        """Return seconds of wall time, of work by all processors, and of our own."""
        try:
            line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
        except OSError:
            return None
        # user nice system idle iowait irq softirq steal, in ticks
        ticks = [int(word) for word in line.split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]
        hertz = os.sysconf("SC_CLK_TCK")
        own = time.process_time() + sum(map(_ticks, children)) / hertz
        return time.perf_counter(), busy / hertz, own


def _ticks(process: int) -> int:
    """Return the processor time of another process, 0 when it has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return sum(map(int, text.rpartition(")")[2].split()[11:13]))  # utime, stime
