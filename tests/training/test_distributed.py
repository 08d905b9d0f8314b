"""Two processes give what one gives with the same global batch, by DDP and by FSDP."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nsp.data.heldout import format_heldout
from nsp.family.recipe import RunConfig
from nsp.family.recipes import preset
from tests.training.pictures import write_pictures

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(
    pictures: Path,
    folder: Path,
    *options: str,
    processes: int = 1,
    config: Path | None = None,
    program: str | Path = "train.py",
) -> str:
    """Run the smoke preset, or a file's run, and return what it printed."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launch += [f"--master_port={_free_port()}"]
    what = ["--preset", "smoke"] if config is None else ["--config", str(config)]
    words = [*launch, str(program), *what, "--output-dir", str(folder)]
    done = subprocess.run(
        [*words, "--data", str(pictures), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "Warning" not in done.stdout, done.stdout
    return done.stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def reports(folder: Path, name: str) -> list[float]:
    lines = sorted(folder.glob("*/log.jsonl"), reverse=True)  # the tokenizer's first
    return [json.loads(line)[name] for log in lines for line in log.read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoint").glob("*/model.safetensors"))
    return {f"{f.parent.name}/{k}": v for f in files for k, v in load_file(f).items()}


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(pictures, folder)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(
    pictures: Path, alone: Path, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "run"
    output = run(pictures, folder, "--parallel", kind, processes=2)
    assert output.count("checkpoint: ") == 1  # one process speaks for both
    for name in ("loss", "grad_norm"):
        # The order of additions is all that differs.
        assert reports(folder, name) == pytest.approx(reports(alone, name), rel=2e-5)
    ours, theirs = weights(folder), weights(alone)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=0, msg=name)


COUNTED = """
from pathlib import Path

from nsp.console.train_command import main
from nsp.training import judging, verdicts

def counted(judge):
    def judged(*given, **options):
        with Path(__file__).with_name("judged").open("a") as file:
            file.write(judge.__name__ + "\\n")
        return judge(*given, **options)
    return judged

for judge in (verdicts.judge_tokenizer, verdicts.judge_generator):
    setattr(judging, judge.__name__, counted(judge))
main()
"""


def test_a_run_of_two_processes_is_judged_once_a_phase(pictures: Path, tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(COUNTED)
    output = run(pictures, tmp_path / "run", "--steps", "1", processes=2, program=program)
    judged = (tmp_path / "judged").read_text().split()
    assert judged == ["judge_tokenizer", "judge_generator"]
    assert output.count("phase predictor: ") == 1


def test_looking_at_held_out_pictures_does_not_change_sharded_training(
    config: RunConfig, tmp_path: Path
) -> None:
    """They are looked at with the averaged weights, which the next step must not compute with."""
    pictures = write_pictures(tmp_path / "pictures")
    rows = [(f"{index}.png", f"colour number {index}") for index in (10, 11)]
    (pictures / "__heldout__").write_text(format_heldout(rows))
    optimizer = replace(config.phases[0].optimizer, warmup_steps=0)
    changes: dict[str, Any] = {"validate_every": 1, "checkpoint_every": 100, "ema_decay": 0.9}
    phase = replace(config.phases[0], optimizer=optimizer, **changes)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(replace(config, phases=(phase,)).to_dict()))
    found = []
    for count, kind in ((1, "ddp"), (2, "fsdp")):
        folder = tmp_path / kind
        run(pictures, folder, "--parallel", kind, processes=count, config=file)
        lines = (folder / "tokenizer/log.jsonl").read_text().splitlines()
        rows_of = [json.loads(line) for line in lines]
        found.append([row["loss"] for row in rows_of if "loss" in row])
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=2e-5)


def test_a_run_moves_between_one_process_and_sharded_two(pictures: Path, tmp_path: Path) -> None:
    config = preset("smoke")
    # At a constant rate, so that a run extended step by step is the run of that many steps.
    steady = replace(config.phases[0].optimizer, schedule="constant", warmup_steps=0)
    phases = tuple(replace(phase, optimizer=steady) for phase in config.phases[:1])
    file = tmp_path / "steady.json"
    file.write_text(json.dumps(replace(config, phases=phases).to_dict()))
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run(pictures, whole, "--steps", "3", config=file)
    run(pictures, moved, "--steps", "1", config=file)
    sharded = ("--resume", "--parallel", "fsdp")
    run(pictures, moved, "--steps", "2", *sharded, processes=2, config=file)
    run(pictures, moved, "--steps", "3", "--resume", "--parallel", "ddp", config=file)
    assert reports(moved, "loss") == pytest.approx(reports(whole, "loss"), rel=2e-5)
    ours, theirs = weights(moved), weights(whole)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=0, msg=name)
