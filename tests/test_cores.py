"""What the number of threads promises: what was asked for, else what this process may use."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsp import cores
from nsp.cores import num_threads, usable_cores
from nsp.errors import ConfigError


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two hyper-threads each, no quota and nothing said about threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "_TOPOLOGY", str(tmp_path / "cpu{}"))
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cpu in range(8):
        (tmp_path / f"cpu{cpu}").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    return tmp_path


def write_group(machine: Path, group: str, **files: str) -> None:
    folder = machine / "cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text + "\n")


def test_hyper_threads_count_once(machine: Path) -> None:
    assert usable_cores() == num_threads() == 4


def test_affinity_is_respected(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 5}, raising=False)
    assert usable_cores() == 2


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        *(("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1)),
        *(("200000 0", 4), ("-1 100000", 4), ("two 100000", 4), ("", 4), ("9" * 5000 + " 1", 4)),
    ],
)
def test_a_containers_quota_is_respected(machine: Path, quota: str, expected: int) -> None:
    write_group(machine, "", cpu_max=quota)
    assert usable_cores() == expected


@pytest.mark.parametrize("root", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize(("quota", "expected"), [("300000", 3), ("-1", 4), ("50000", 1)])
def test_the_quota_of_version_1_is_respected(
    machine: Path, root: str, quota: str, expected: int
) -> None:
    """In a container of an older host: its own group lies where the tree begins."""
    (machine / "own").write_text("5:cpu,cpuacct:/docker/f00\n3:memory:/docker/f00\n")
    write_group(machine, root, cpu_cfs_quota_us=quota, cpu_cfs_period_us="100000")
    assert usable_cores() == expected


@pytest.mark.parametrize("tree", [".", "unified"])
def test_the_smallest_quota_of_the_groups_around_is_respected(machine: Path, tree: str) -> None:
    """As batch systems nest them: node, job, step."""
    (machine / "own").write_text("1:name=systemd:/\n0::/slurm/job_7/step_0\n")
    write_group(machine, f"{tree}/slurm/job_7/step_0", cpu_max="max 100000")
    write_group(machine, f"{tree}/slurm/job_7", cpu_max="200000 100000")
    write_group(machine, f"{tree}/slurm", cpu_max="300000 100000")
    assert usable_cores() == 2


def test_groups_outside_the_tree_and_odd_lines_are_passed_over(machine: Path) -> None:
    (machine / "own").write_text("0::/../../other\nfrob\n\n9:cpu\n")
    write_group(machine, "other", cpu_max="100000 100000")
    assert usable_cores() == 1
    (machine / "own").write_bytes(b"\xff\xfe")
    assert usable_cores() == 4


def test_an_unknown_topology_counts_logical_processors(machine: Path) -> None:
    for path in machine.glob("cpu*"):
        path.unlink()
    assert usable_cores() == 8


@pytest.mark.parametrize(("given", "expected"), [("1", 1), ("6", 6), (" 2 ", 2), ("3,2", 3)])
def test_omp_num_threads_decides_where_nothing_is_asked(
    machine: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert num_threads() == expected
    assert num_threads(2) == 2
    assert usable_cores() == 4


@pytest.mark.parametrize("given", ["", " ", "abc", "0", "-2", "1.5", "9" * 5000, "1025", ",4", "½"])
def test_an_omp_num_threads_that_is_no_number_is_ignored_with_a_warning(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: str,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    with caplog.at_level(logging.WARNING):
        assert num_threads() == 4
    assert ("OMP_NUM_THREADS" in caplog.text) == bool(given.strip())


@pytest.mark.parametrize("asked", [0, -1, 1.5, True, "2", 10**30, 1025, np.array([1]), [2]])
def test_a_number_of_threads_that_cannot_be_is_refused(machine: Path, asked: Any) -> None:
    with pytest.raises(ConfigError, match="num_threads must be"):
        num_threads(asked)
    assert num_threads(np.int64(3)) == 3
