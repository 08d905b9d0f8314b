"""What this machine has: software, hardware, runtime backends, and what could be installed."""

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.backends.available import availability, backend_names
from nsp.backends.nvidia import find_gpu
from nsp.distribution import checkout, extras, installed_version, pip_install, version

if TYPE_CHECKING:
    from rich.console import RenderableType

# Extras that combine others or replace onnxruntime; the line of that backend describes it.
_NOT_LISTED = ("all", "gpu")
_FOR_A_GPU = ("tensorrt", "tensorrt-rtx")


def examine() -> dict[str, Any]:
    """Return what this machine has and what is missing, JSON-ready; no engine is loaded."""
    gpu = find_gpu()
    return {
        "nsp": version(),
        "checkout": None if (folder := checkout()) is None else str(folder),
        "python": platform.python_version(),
        "os": _os_name(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(_ram_bytes() / 2**30, 1),
        "gpu": None if gpu is None else asdict(gpu),
        "backends": [{"name": name, **asdict(availability(name))} for name in backend_names()],
        "extras": _extras(has_gpu=gpu is not None),
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
        "nsp": found["nsp"] if found["checkout"] is None else _of_checkout(found),
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
    wanted = Table(box=None, pad_edge=False)
    for heading in ("\nextra", "\nmissing", "\ninstall"):
        wanted.add_column(heading, overflow="fold")
    for extra in found["extras"]:
        advice = extra["install"] or ("needs an NVIDIA GPU" if extra["missing"] else "")
        wanted.add_row(extra["name"], ", ".join(extra["missing"]) or "-", advice)
    return [machine, backends, wanted]


def _of_checkout(found: Mapping[str, Any]) -> str:
    return f"{found['nsp']}, run from the checkout {found['checkout']}"


def _os_name() -> str:
    """Return the Linux distribution's name, if there is one, with kernel and machine."""
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
    """Return the memory that this process may use: the machine's, or a control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return total
    return min(total, limit)


def _extras(*, has_gpu: bool) -> list[dict[str, Any]]:
    """Return every extra of this project with its missing requirements.

    Only presence is checked; versions are pip's task. Without an NVIDIA GPU, packages that need
    one are not recommended.
    """
    found = []
    for extra, requirements in extras().items():
        if extra in _NOT_LISTED:
            continue
        missing = [line.partition(";")[0].strip() for line in requirements if _is_missing(line)]
        of_use = has_gpu or extra not in _FOR_A_GPU
        install = pip_install(extra) if missing and of_use else None
        found.append({"name": extra, "missing": missing, "install": install})
    return found


def _is_missing(requirement: str) -> bool:
    name = re.match(r"[\w.-]+", requirement)
    return name is not None and installed_version(name[0]) is None
