"""What this machine offers: software, hardware, runtime backends, and what could be installed."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.runtime.backends.registry import BACKENDS, availability
from nsp.runtime.nvidia import find_gpu

if TYPE_CHECKING:
    from rich.console import RenderableType

# Made of other extras; replaces onnxruntime, about which that backend's own line speaks.
_NOT_LISTED = ("all", "gpu")


def examine() -> dict[str, Any]:
    """Return what this machine has and lacks, JSON-ready; no engine is loaded."""
    return {
        "nsp": _version("nsp"),
        "python": platform.python_version(),
        "os": _os_name(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(_ram_bytes() / 2**30, 1),
        "gpu": None if (gpu := find_gpu()) is None else asdict(gpu),
        "backends": [{"name": name, **asdict(availability(name))} for name in BACKENDS],
        "extras": _extras(),
    }


def render_findings(found: Mapping[str, Any]) -> list["RenderableType"]:
    """Return tables of `examine`'s findings, to be printed one after another."""
    from rich.table import Table

    machine = Table(box=None, show_header=False, pad_edge=False)
    gpu = "no NVIDIA GPU with a driver"
    if found["gpu"] is not None:
        gpu = "{name}, SM {compute_capability}, driver for CUDA {driver_cuda}".format(
            **found["gpu"]
        )
    rows = {
        "nsp": found["nsp"] or "not installed (run from a checkout)",
        "Python": found["python"],
        "OS": found["os"],
        "CPU": f"{found['cpu']}, {found['cpu_cores']} cores",
        "RAM": f"{found['ram_gib']} GiB",
        "GPU": gpu,
    }
    for name, value in rows.items():
        machine.add_row(name, value)
    backends = Table(box=None, pad_edge=False)
    for heading in ("\nbackend", "\nworks here", "\nwhy", "\ninstall"):
        backends.add_column(heading, overflow="fold")
    for backend in found["backends"]:
        works = "yes" if backend["works"] else "no"
        backends.add_row(backend["name"], works, backend["reason"], backend["install"] or "")
    extras = Table(box=None, pad_edge=False)
    for heading in ("\nextra", "\nmissing", "\ninstall"):
        extras.add_column(heading, overflow="fold")
    for extra in found["extras"]:
        extras.add_row(extra["name"], ", ".join(extra["missing"]) or "-", extra["install"] or "")
    return [machine, backends, extras]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _os_name() -> str:
    """Return the distribution's name where there is one, with kernel and machine."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()} {platform.machine()}"


def _cpu_name() -> str:
    """Return the processor's model name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _ram_bytes() -> int:
    """Return the memory this process may use: the machine's, or less in a control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return total
    return min(total, limit)


def _extras() -> list[dict[str, Any]]:
    """Return every extra of this package with the requirements that are not installed.

    Presence is all that is checked: pip knows about versions.
    """
    try:
        wanted = importlib.metadata.requires("nsp") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    missing: dict[str, list[str]] = {}
    for line in wanted:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"""extra == ['"](.+?)['"]""", marker)
        name = re.match(r"[\w.-]+", requirement)
        if extra is None or name is None or extra[1] in _NOT_LISTED:
            continue
        absent = missing.setdefault(extra[1], [])
        if _version(name[0]) is None:
            absent.append(requirement.strip())
    return [
        {
            "name": extra,
            "missing": absent,
            "install": f"pip install 'nsp[{extra}]'" if absent else None,
        }
        for extra, absent in missing.items()
    ]
