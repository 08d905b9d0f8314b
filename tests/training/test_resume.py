"""A resumed run is the run that was stopped: its own prompt tokenizer, its own settings."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nsp.console.train_config import configure
from nsp.errors import ConfigError
from nsp.family.recipe import RunConfig
from nsp.text.tokenizer import PromptTokenizer
from nsp.training.folder import locked
from nsp.training.whole_run import train
from tests.training.pictures import write_pictures


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run on data of its own after its first phase."""
    folder = tmp_path_factory.mktemp("stopped")
    data = write_pictures(folder / "data")
    run = configure("smoke", None, data=str(data), seed=3, steps=2)
    train(run, folder / "run", last_phase="tokenizer")
    return run, folder / "run"


def test_resuming_with_changed_captions_keeps_the_prompt_tokenizer(
    config: RunConfig, tmp_path: Path
) -> None:
    data = write_pictures(tmp_path / "data", "colour number")
    run = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(data)))
    train(run, tmp_path / "run")
    ids = PromptTokenizer.load(tmp_path / "run/checkpoint/tokenizer").encode(["colour number 3"])
    write_pictures(data, "many other words in every caption")
    tokenizer, predictor = run.phases
    longer = (tokenizer, dataclasses.replace(predictor, steps=6))
    run = dataclasses.replace(run, phases=longer)
    train(run, tmp_path / "run", resume=True, accept_changed_data=True)
    resumed = PromptTokenizer.load(tmp_path / "run/checkpoint/tokenizer")
    assert (resumed.encode(["colour number 3"]) == ids).all()


def test_a_resumed_run_does_not_need_the_text_encoder_it_started_from(
    config: RunConfig, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    encoder = tmp_path / "encoder"
    encoder.symlink_to(tiny_checkpoint)
    run = dataclasses.replace(config, text_encoder={"folder": str(encoder)})
    train(run, tmp_path / "run", last_phase="tokenizer")
    encoder.unlink()
    assert train(run, tmp_path / "run", resume=True).finished


@pytest.mark.parametrize(
    ("preset", "options", "refusal"),
    [
        (None, {"data": "emoji"}, "data.source"),
        (None, {"text_encoder": "elsewhere"}, "text_encoder.folder"),
        (None, {"seed": 4}, "seed is 3, not 4"),
        ("quick", {}, "has the phases tokenizer, predictor, not"),
    ],
)
def test_resuming_refuses_an_option_that_contradicts_the_run(
    stopped: tuple[RunConfig, Path], preset: str | None, options: dict[str, Any], refusal: str
) -> None:
    _, folder = stopped
    given = configure(preset, folder, **options)
    with pytest.raises(ConfigError, match=refusal) as caught:
        train(given, folder, resume=True)
    assert "\n" not in str(caught.value)


def test_the_command_that_started_a_run_may_leave_its_options_out(
    stopped: tuple[RunConfig, Path],
) -> None:
    run, folder = stopped
    assert configure(None, folder) == run
    assert configure("smoke", folder) == run


def test_steps_may_change_and_are_logged(
    stopped: tuple[RunConfig, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = stopped
    with caplog.at_level(logging.INFO):
        given = configure(None, folder, steps=3)
        train(given, folder, last_phase="tokenizer", resume=True)
    assert "phases.0.steps is now 3; it was 2" in caplog.text


def test_a_file_and_a_preset_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are both given; choose one"):
        configure("smoke", None, config=tmp_path / "run.json")


def test_a_phase_does_not_go_on_under_a_later_one(config: RunConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    tokenizer, predictor = config.phases
    longer = dataclasses.replace(tokenizer, steps=6)
    with pytest.raises(ConfigError, match="predictor was trained on tokenizer after 4"):
        train(
            dataclasses.replace(config, phases=(longer, predictor)), tmp_path / "run", resume=True
        )


def test_the_number_of_workers_may_change(stopped: tuple[RunConfig, Path]) -> None:
    run, folder = stopped
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, num_workers=1))
    assert train(other, folder, last_phase="tokenizer", resume=True).finished
    train(run, folder, last_phase="tokenizer", resume=True)


def test_a_run_with_other_phases_is_refused_in_one_line(
    stopped: tuple[RunConfig, Path],
) -> None:
    run, folder = stopped
    fewer = dataclasses.replace(run, phases=run.phases[:1])
    with pytest.raises(ConfigError, match="has the phases tokenizer, predictor, not tokenizer;"):
        train(fewer, folder, resume=True)


def test_a_phase_whose_folder_is_deleted_is_trained_again_from_where_it_started(
    config: RunConfig, tmp_path: Path
) -> None:
    tokenizer, predictor = config.phases
    longer = dataclasses.replace(
        config, phases=(dataclasses.replace(tokenizer, steps=6), predictor)
    )
    train(config, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/predictor")
    train(longer, tmp_path / "again", resume=True)
    train(config, tmp_path / "once", last_phase="tokenizer")
    train(longer, tmp_path / "once", resume=True)
    for part in ("vae", "predictor", "text_encoder"):
        again, once = (
            load_file(tmp_path / name / "checkpoint" / part / "model.safetensors")
            for name in ("again", "once")
        )
        assert all(torch.equal(again[name], once[name]) for name in once), part
    rows = (tmp_path / "again/predictor/log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_folder_is_made_again_from_the_saved_steps(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config, tmp_path / "run")
    weights = (tmp_path / "run/checkpoint/vae/model.safetensors").read_bytes()
    for spoilt in ("config.json", "vae/model.safetensors"):
        caplog.clear()
        path = tmp_path / "run/checkpoint" / spoilt
        path.write_bytes(path.read_bytes()[:-9] + b"?" * 9)
        assert train(config, tmp_path / "run", resume=True).finished
        assert "creating it again from the saved steps" in caplog.text
        assert (tmp_path / "run/checkpoint/vae/model.safetensors").read_bytes() == weights


def test_two_runs_in_one_folder_are_refused(config: RunConfig, tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(ConfigError, match="another process trains in"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
