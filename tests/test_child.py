"""What every child process promises: it ends with its block, with all that it has started."""

import time
from pathlib import Path

import pytest

from nsp.child import Child

_PROGRAM = """
import os, subprocess, sys, time
beside = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(os.getpid(), beside.pid, flush=True)
print("x" * 200_000, file=sys.stderr)  # more than a pipe holds
print("last words", file=sys.stderr, flush=True)
if sys.argv[1] == "polite":
    sys.stdin.read()
    sys.exit()
time.sleep(60)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_program.py").write_text(_PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "a_program"


def alive(pid: int) -> bool:
    """Return whether a process runs; one that waits for its parent to notice its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", ["polite", "deaf"])
def test_it_ends_with_its_block_and_so_does_what_it_started(module: str, kind: str) -> None:
    with Child(module, kind, grace_s=5.0 if kind == "polite" else 0.1) as child:
        pids = [int(word) for word in child.output.readline().split()]
        assert all(map(alive, pids))
    assert child.process.returncode == (0 if kind == "polite" else -9)
    assert child.last_words() == "last words"
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, pids))


@pytest.mark.parametrize("politely", [True, False])
def test_a_time_limit_ends_it(module: str, politely: bool) -> None:
    began = time.monotonic()
    with Child(module, "polite") as child, child.time_limit(0.5, politely=politely) as reached:
        assert child.output.readline()
        assert child.output.read() == ""
    assert reached.is_set()
    assert time.monotonic() - began < 10


def test_an_error_in_the_block_ends_it(module: str) -> None:
    with pytest.raises(KeyboardInterrupt), Child(module, "deaf", grace_s=0.1) as child:
        raise KeyboardInterrupt
    assert child.process.returncode == -9
