"""How many threads engines use on a CPU, and how many cores this process may really use."""

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from nsp.values import count

MAX_THREADS = 1024  # more than any processor has cores; every stage's session starts that many
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"

logger = logging.getLogger(__name__)


def num_threads(asked: Any = None) -> int:
    """Return the number of threads to compute with: `asked`, else OMP_NUM_THREADS, else every core.

    OMP_NUM_THREADS is read as OpenMP reads it: in a list ("4,2") the first number is for the
    outermost level. An empty value counts as not set; a value that is not a number from 1 to 1024
    is ignored with a warning.
    Raises ConfigError for an `asked` number that is not allowed.
    """
    if asked is not None:
        return count("num_threads", asked, most=MAX_THREADS)
    given = os.environ.get("OMP_NUM_THREADS", "").strip()
    first = given.partition(",")[0].strip()
    if first.isdecimal() and len(first) <= 9 and 1 <= int(first) <= MAX_THREADS:
        return int(first)
    cores = usable_cores()
    if given:
        logger.warning(
            "OMP_NUM_THREADS=%r is ignored: it must be a number from 1 to %d; threads: %d",
            given,
            MAX_THREADS,
            cores,
        )
    return cores


def usable_cores() -> int:
    """Return the number of physical cores open to this process, at least 1.

    Counts hyper-threads once (matrix products gain nothing from the second one) and respects CPU
    affinity and the quotas of containers and batch systems: threads beyond either only wait for
    each other.
    """
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # macOS and Windows have no affinity call
        cpus = set(range(os.cpu_count() or 1))
    cores = len({_siblings(cpu) for cpu in cpus})
    return max(1, min([cores, *_quotas()]))


def _siblings(cpu: int) -> str:
    """Return the hyper-threads that share a core with `cpu`; only `cpu` if that is unknown."""
    try:
        return Path(_TOPOLOGY.format(cpu)).read_text().strip()
    except OSError:
        return str(cpu)


def _quotas() -> Iterator[int]:
    """Yield the number of cores that each control group of this process allows, rounded up."""
    for group in _own_groups():
        for quota, period in (_v2_quota(group), _v1_quota(group)):
            if quota > 0 and period > 0:
                yield math.ceil(quota / period)


def _own_groups() -> Iterator[Path]:
    """Yield the folders of the control groups this process is in, and of those around them.

    A line of /proc/self/cgroup is "0::/path" (version 2) or "4:cpu,cpuacct:/path" (version 1).
    In a container, the path may be the host's while the tree begins at the container's own group.
    """
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except (OSError, ValueError):
        lines = []
    for line in [*lines, "0::/", "1:cpu:/"]:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            roots = [_CGROUPS, _CGROUPS / "unified"]  # the second beside version 1
        elif "cpu" in controllers.split(","):
            roots = [_CGROUPS / "cpu", _CGROUPS / controllers]
        else:
            continue
        inside = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..")))
        for root in roots:
            yield from (root / each for each in (inside, *inside.parents))


def _v2_quota(group: Path) -> tuple[int, int]:
    """Return the allowed microseconds and their period: `cpu.max` is "200000 100000" or "max …"."""
    try:
        granted, period = (group / "cpu.max").read_text().split()
        return int(granted), int(period)
    except (OSError, ValueError):  # no such group, or "max"
        return 0, 0


def _v1_quota(group: Path) -> tuple[int, int]:
    """Return the allowed microseconds and their period; -1 means no limit."""
    try:
        granted, period = (
            int((group / name).read_text()) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
    except (OSError, ValueError):
        return 0, 0
    return granted, period
