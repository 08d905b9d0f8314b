"""A run killed at any moment and resumed ends with the weights of an uninterrupted one."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
STEPS = 12


def command(pictures: Path, folder: Path) -> list[str]:
    options = ["--steps", str(STEPS), "--data", str(pictures), "--output-dir", str(folder)]
    return [sys.executable, "train.py", "--preset", "smoke", *options]


def start(words: list[str], *, own_group: bool = False) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0 if own_group else None,
    )


def finish(words: list[str]) -> None:
    process = start(words)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoint").glob("*/model.safetensors"))
    assert len(files) == 3
    return {f"{f.parent.name}/{k}": v for f in files for k, v in load_file(f).items()}


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(
    pictures: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(command(pictures, whole))
    rng, kills = random.Random(), []
    process = start(command(pictures, killed))
    for phase in ("tokenizer", "predictor"):
        at = rng.randrange(1, STEPS)
        _wait_for(killed / phase / "log.jsonl", at, process)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
        kills.append((phase, at))
        process = start([*command(pictures, killed), "--resume"])
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    first, second = weights(whole), weights(killed)
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing, f"killed at {kills}"
    steps = [
        [
            json.loads(line)["step"]
            for line in (killed / phase / "log.jsonl").read_text().splitlines()
        ]
        for phase in ("tokenizer", "predictor")
    ]
    assert steps == [list(range(1, STEPS + 1))] * 2  # nothing twice, nothing lost
    left = {path.name for path in killed.rglob(".*")}
    assert left == {path.name for path in whole.rglob(".*")} == {".lock"}


def _wait_for(log: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Wait until `step` steps are reported."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    assert process.poll() == 0, "the run died or made no steps"


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_sigterm_to_the_group_of_a_run_with_workers_ends_and_saves_it(
    pictures: Path, tmp_path: Path
) -> None:
    """`timeout` and cluster schedulers signal the workers too."""
    folder = tmp_path / "run"
    words = [*command(pictures, folder), "--steps", "100000", "--num-workers", "2"]
    process = start(words, own_group=True)
    try:
        _wait_for(folder / "tokenizer" / "log.jsonl", 3, process)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output
    assert "stopped; continue with" in output
    assert "Traceback" not in output
    saved = [path.name for path in (folder / "tokenizer" / "checkpoints").glob("step*")]
    made = (folder / "tokenizer" / "log.jsonl").read_text().splitlines()
    assert max(saved) == f"step{json.loads(made[-1])['step']:08d}"
