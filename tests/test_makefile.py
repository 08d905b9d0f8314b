"""`make` asks for the torch that suits the machine, and a missing index stops nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANGE = '"torch>=2.11,<2.14"'


def planned(*variables: str) -> str:
    """Return the commands that make would run in a fresh checkout."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--dry-run", "demo", "VENV=/nonexistent/venv", *variables],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_without_an_nvidia_driver_torch_comes_from_the_index_for_cpus() -> None:
    line = next(row for row in planned("NVIDIA=").splitlines() if "torch>=" in row)
    assert RANGE in line
    assert "deploy/reachable.py https://download.pytorch.org/whl/cpu" in line


def test_with_an_nvidia_driver_torch_comes_from_the_usual_index() -> None:
    line = next(row for row in planned("NVIDIA=yes").splitlines() if "torch>=" in row)
    assert RANGE in line
    assert "reachable" not in line


def test_an_index_that_cannot_be_reached_is_one_line() -> None:
    command = [sys.executable, str(ROOT / "deploy/reachable.py"), "http://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "torch comes from the usual index" in done.stderr


def test_the_range_is_declared_alike_everywhere() -> None:
    for name in ("pyproject.toml", "Makefile"):
        assert RANGE in (ROOT / name).read_text()
    assert RANGE.strip('"') in (ROOT / "nsp/backends/available.py").read_text()
