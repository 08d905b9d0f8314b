"""A training run resumes exactly, leaves a checkpoint when interrupted, and names its errors."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.data.sources import open_source
from nsp.errors import CheckpointError, ConfigError, DataError
from nsp.family.recipe import RunConfig
from nsp.family.recipes import preset, recipe, recipes
from nsp.family.registry import family
from nsp.pipeline.pipeline import load_pipeline
from nsp.training.whole_run import train

ROOT = Path(__file__).parents[2]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    parts = ("vae", "predictor", "text_encoder")
    return {
        f"{part}/{name}": tensor
        for part in parts
        for name, tensor in load_file(run_folder / f"checkpoint/{part}/model.safetensors").items()
    }


def test_resumed_run_equals_an_uninterrupted_one(config: RunConfig, tmp_path: Path) -> None:
    whole = train(config, tmp_path / "whole")
    assert whole.finished
    train(config, tmp_path / "parts", last_phase="tokenizer")
    _stop_after(config, tmp_path / "parts", steps=3)
    train(config, tmp_path / "parts", resume=True)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing


def _stop_after(config: RunConfig, folder: Path, *, steps: int) -> None:
    """Ask the predictor phase to stop after `steps` steps, as a batch system does."""
    from nsp.training import trainer

    advance: Callable[..., None] = trainer.Progress.advance

    def signalled(self: trainer.Progress, step: int) -> None:
        advance(self, step)
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Progress, "advance", signalled)
        assert not train(config, folder, resume=True).finished


def test_checkpoint_of_a_run_generates(config: RunConfig, tmp_path: Path) -> None:
    result = train(config, tmp_path / "run")
    assert (tmp_path / "run/tokenizer/samples/step000004.png").is_file()
    assert (tmp_path / "run/predictor/samples/step000004.png").is_file()
    record = read_checkpoint(result.checkpoint)
    assert record.notes["steps"] == {"tokenizer": 4, "predictor": 4}
    images = load_pipeline(result.checkpoint).generate(prompts=["colour number 3"]).images
    assert images.shape == (1, 16, 16, 3)


def test_ctrl_c_leaves_a_usable_checkpoint(pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "--preset", "smoke", "--steps", "100000"]
    command += ["--data", str(pictures), "--output-dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run/tokenizer/log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "--resume" in err
    assert load_pipeline(tmp_path / "run/checkpoint").generate(prompts=["x"]).images.any()
    assert "checkpoint:" in out


def test_a_used_folder_is_not_overwritten(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run/tokenizer/checkpoints/step00000001").mkdir(parents=True)
    (tmp_path / "run/run.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ConfigError, match="--resume"):
        train(config, tmp_path / "run")


def test_resume_without_a_run_says_so(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run to resume"):
        train(config, tmp_path / "nothing", resume=True)


@pytest.mark.parametrize("name", sorted(recipes(built_in_only=True)))
def test_presets_round_trip_and_never_see_held_out_captions(name: str) -> None:
    parameters = recipe(name).parameters
    asked = (
        {"data": "photos", "start_from": "model"}
        if any(each.is_required for each in parameters)
        else {}
    )
    given = {each.name: asked[each.name] for each in parameters if each.name in asked}
    if "dataset" in {each.name for each in parameters}:  # without pictures of its own
        given = {"data": "photos"}
        if "vae_path" in {each.name for each in parameters}:
            given["start_from"] = "model"
    run = preset(name, **given)
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert run.data.source == given.get("data", "emoji")


def test_emoji_training_split_excludes_every_held_out_caption() -> None:
    trained = {sample.caption for sample in open_source("emoji", split="train").samples}
    held_out = {sample.caption for sample in open_source("emoji", split="heldout").samples}
    assert len(held_out) == 200
    assert not trained & held_out


def test_a_pretrained_clip_folder_can_be_the_text_encoder(
    tiny_checkpoint: Path, config: RunConfig, tmp_path: Path
) -> None:
    """The checkpoint's text_encoder/ and tokenizer/ are laid out like a diffusers pipeline's."""
    frozen = {"train_text_encoder": False}
    phases = tuple(
        dataclasses.replace(p, objective=frozen) if p.name == "predictor" else p
        for p in config.phases
    )
    run = dataclasses.replace(config, text_encoder={"folder": str(tiny_checkpoint)}, phases=phases)
    result = train(run, tmp_path / "run")
    parts = [
        load_file(folder / "text_encoder" / "model.safetensors")
        for folder in (tiny_checkpoint, result.checkpoint)
    ]
    assert parts[0].keys() == parts[1].keys()
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])


def test_every_epoch_draws_its_own_crops(pictures: Path, tmp_path: Path) -> None:
    from nsp.data.dataset import ImageDataset
    from nsp.training.loading import _AtEpoch

    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    (tmp_path / "noise.txt").write_text("noise")
    source = open_source(tmp_path)
    data = _AtEpoch(ImageDataset(source, 16, train=True, crop=True))
    first, second = data[0, 0]["image"], data[1, 0]["image"]
    assert not torch.equal(first, second)
    assert torch.equal(data[0, 0]["image"], first)


def test_a_run_that_never_started_leaves_its_folder_free(config: RunConfig, tmp_path: Path) -> None:
    data = dataclasses.replace(config.data, source=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):
        train(dataclasses.replace(config, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("other", ["start", "no prompts"])
def test_a_text_encoder_that_no_model_would_have_is_refused(
    other: str, config: RunConfig, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    run = dataclasses.replace(config, text_encoder={"folder": str(tiny_checkpoint)})
    if other == "start":
        run = dataclasses.replace(run, start_from=str(tiny_checkpoint))
    else:
        model = family("latent_gpt").sizes["tiny"]
        words = {"family": "latent_gpt", "model": {**model.to_dict(), "text": None}}
        run = dataclasses.replace(run, **words)
    with pytest.raises(ConfigError, match=r"text.encoder .*(from|omit --text-encoder)"):
        train(run, tmp_path / "run", device="cpu")
