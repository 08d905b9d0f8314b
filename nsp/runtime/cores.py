"""How many CPU cores this process may really use."""

import math
import os
from pathlib import Path

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def usable_cores() -> int:
    """Return the number of physical cores open to this process, at least 1.

    Counts hyper-threads once (matrix products gain nothing from the second one) and respects CPU
    affinity and the quota of a container: threads beyond either only wait for each other.
    """
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # macOS and Windows have no affinity call
        cpus = set(range(os.cpu_count() or 1))
    cores = len({_siblings(cpu) for cpu in cpus})
    return max(1, min(cores, _quota()))


def _siblings(cpu: int) -> str:
    """Return the hyper-threads that share a core with `cpu`; itself where that is unknown."""
    try:
        return Path(_TOPOLOGY.format(cpu)).read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """Return the cores a cgroup (v2) grants, rounded up; a large number without a quota."""
    try:
        granted, period = _CGROUP_QUOTA.read_text().split()
        return math.ceil(int(granted) / int(period))
    except (OSError, ValueError):  # no cgroup, or "max"
        return 1 << 16
