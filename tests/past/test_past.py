"""What was written before is of use today, or is refused with the command that makes it anew."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.testing import assert_allclose
from safetensors.torch import load_file

import nsp
from nsp.artifacts.checkpoint import read_checkpoint
from nsp.cli import main as cli
from nsp.train import main as train

PAST = Path(__file__).parent
ERAS = ("before_digests", "before_orders")
PARTS = ("predictor", "text_encoder", "vae")
# Another processor sums in another order. Two steps of Adam move a weight by up to 0.02.
SAME_WEIGHTS = 1e-4
SAME_LOSS = 1e-4
END_LOSS = 2.53282  # that the old code logged for the last step
SAME_PIXELS = 1  # of 255, which rounding may tip


def drawn(era: str) -> list[dict[str, Any]]:
    """Return what the old code drew of its checkpoint."""
    found: list[dict[str, Any]] = json.loads((PAST / era / "drawn.json").read_text())
    return found


def draw_again(pipe: nsp.Pipeline, order: dict[str, Any]) -> tuple[list[list[int]], Any]:
    """Return the tokens of each scale step, and the pixels."""
    settings = {name: value for name, value in order.items() if name != "prompt"}
    made = pipe.generate(prompts=[order["prompt"]], trace=True, **settings)
    assert made.trace is not None
    return [step[0].tolist() for step in made.trace.tokens], made.images[0].astype(int)


def parts(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights of every part of a checkpoint."""
    return {part: load_file(checkpoint / part / "model.safetensors") for part in PARTS}


def losses(run: Path) -> dict[int, float]:
    """Return the predictor's loss of each step."""
    rows = map(json.loads, (run / "predictor/log.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_the_files_are_as_old_as_they_are_said_to_be() -> None:
    assert not read_checkpoint(PAST / "before_digests/checkpoint").files
    assert read_checkpoint(PAST / "before_orders/checkpoint").files
    assert not (PAST / "before_digests/run/data.json").exists()
    assert json.loads((PAST / "before_orders/engines/manifest.json").read_text())["schema"] == 2


@pytest.mark.parametrize("era", ERAS)
def test_an_old_checkpoint_draws_the_tokens_and_the_picture_it_drew(era: str) -> None:
    pipe = nsp.load_pipeline(PAST / era / "checkpoint")
    for each in drawn(era):
        tokens, pixels = draw_again(pipe, each["order"])
        assert tokens == each["tokens"], each["order"]
        assert_allclose(pixels, np.array(each["pixels"]), rtol=0, atol=SAME_PIXELS)


@pytest.mark.parametrize("era", ERAS)
def test_an_old_run_resumes_to_the_weights_it_had_at_its_end(
    era: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # its data are `pictures`, from where it was started
    shutil.copytree(PAST / era / "run", "run")
    shutil.copytree(PAST / "pictures", "pictures")
    ended = CliRunner().invoke(train, ["--resume", "--output-dir", "run"])
    assert ended.exit_code == 0, ended.output
    assert list(losses(Path("run"))) == [1, 2, 3, 4]
    assert losses(Path("run"))[4] == pytest.approx(END_LOSS, abs=SAME_LOSS)
    now, then = parts(Path("run/checkpoint")), parts(PAST / era / "checkpoint")
    before = parts(PAST / era / "run/checkpoint")
    for part in PARTS:
        assert now[part].keys() == then[part].keys()
        for name, weight in then[part].items():
            torch.testing.assert_close(now[part][name], weight, rtol=0, atol=SAME_WEIGHTS)
    head = "head.weight"
    moved = before["predictor"][head] - then["predictor"][head]
    assert moved.abs().max() > 10 * SAME_WEIGHTS
    assert read_checkpoint(Path("run/checkpoint")).files  # as of today, with digests


def test_old_engines_are_refused_with_the_command_that_builds_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PAST / "before_orders/checkpoint", "run/checkpoint")
    shutil.copytree(PAST / "before_orders/engines", "engines")
    stages = json.loads(Path("engines/manifest.json").read_text())["stages"]
    for name in (name for variants in stages.values() for v in variants for name in v["files"]):
        Path("engines", name).parent.mkdir(parents=True)  # an engine, which nobody reads
        Path("engines", name).touch()
    generate = ["generate", "--engine-dir", "engines", "--prompt", "red square"]
    refused = CliRunner().invoke(cli, generate)
    assert refused.exit_code == 1
    (line,) = refused.stderr.splitlines()
    assert "has schema 2, this nsp reads 3" in line
    program, *again = shlex.split(line.partition("run: ")[2])
    assert program == "nsp"
    assert again[again.index("--target") + 1] == "onnxruntime"  # as those that were there
    built = CliRunner().invoke(cli, again)
    assert built.exit_code == 0, built.output
    assert CliRunner().invoke(cli, generate).exit_code == 0
    pipe = nsp.load_pipeline("engines")
    for each in drawn("before_orders"):
        assert draw_again(pipe, each["order"])[0] == each["tokens"]
