"""`python train.py` stops in one line at any moment, and names folders and commands that work."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nsp.cli import main as nsp
from nsp.console.train_command import main
from nsp.training import run_phase, trainer, whole_run
from tests.training.pictures import write_pictures


@pytest.fixture
def smoke(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a short run, started from an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ["--preset", "smoke", "--data", str(pictures)]


def run(*options: str) -> Result:
    result = CliRunner().invoke(main, options)
    assert isinstance(result.exception, SystemExit | type(None)), result.exception
    return result


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_before_the_first_step_leaves_the_folder_usable(
    smoke: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(whole_run, "open_pictures", interrupted)
        result = run(*smoke)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("stopped before the first step")
    assert run(*smoke, "--phase", "tokenizer").exit_code == 0


def test_ctrl_c_between_start_and_first_step_can_be_resumed(
    smoke: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_phase, "Phase", interrupted)
        result = run(*smoke, "--phase", "tokenizer")
    assert result.exit_code == 130
    assert run(*advised(result)).exit_code == 0


def advised(result: Result) -> list[str]:
    """Return the options of the command that a stopped run tells to continue with."""
    words = shlex.split(result.stderr.splitlines()[-1].partition("continue with: ")[2])
    assert words[:2] == ["python", "train.py"]
    return words[2:]


def test_the_advised_command_repeats_the_options_that_still_matter(
    smoke: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ["--output-dir", "my run"]
    rest = ["--phase", "tokenizer", "--skip-bad-files"]
    monkeypatch.setattr(trainer.Phase, "_train_step", interrupted)
    result = run(*smoke, *folder, *rest)
    assert result.exit_code == 130
    assert advised(result) == ["--resume", *folder, *rest]


def test_a_run_from_a_file_has_a_folder_of_the_files_name(smoke: list[str]) -> None:
    assert run(*smoke, "--phase", "tokenizer").exit_code == 0
    Path("mine.json").write_text(Path("runs/smoke/run.json").read_text())
    assert run("--config", "mine.json", "--phase", "tokenizer").exit_code == 0
    assert Path("runs/mine/run.json").is_file()
    resumed = run("--config", "mine.json", "--resume")
    assert resumed.exit_code == 0
    assert "checkpoint: runs/mine/checkpoint" in resumed.stdout


def test_an_output_folder_that_is_a_file_is_one_line(smoke: list[str]) -> None:
    Path("file").write_text("")
    result = run(*smoke, "--output-dir", "file")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: file is not a folder; choose another --output-dir"
    ]


def test_a_finished_run_says_where_everything_lies_and_what_comes_next(smoke: list[str]) -> None:
    result = run(*smoke)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tokenizer: 4 of 4 steps, loss ")
    assert "  samples: runs/smoke/predictor/samples" in lines
    assert "watch: tensorboard --logdir runs/smoke/tensorboard" in lines
    assert lines[-2:] == [
        "checkpoint: runs/smoke/checkpoint",
        "next: nsp export --checkpoint runs/smoke/checkpoint",
    ]


def test_a_caption_that_is_too_long_is_warned_of_once(smoke: list[str]) -> None:
    pictures = write_pictures(Path("pictures"))
    (pictures / "3.txt").write_text("colour number " * 30)
    result = run("--preset", "smoke", "--data", str(pictures))
    assert result.exit_code == 0, result.stderr
    lines = result.stderr.splitlines()
    (said,) = [line for line in lines if "longer than" in line]
    assert said.startswith("warning: prompt 'colour number colour")
    assert any("predictor 4/4" in line for line in lines)  # other lines are there as well


def test_after_the_first_phase_alone_the_rest_comes_next(smoke: list[str]) -> None:
    lines = run(*smoke, "--phase", "tokenizer").stdout.splitlines()
    assert lines[-1] == "next: python train.py --resume --output-dir runs/smoke"


def test_the_command_after_nsp_data_cache_trains_the_predictor_on_it(smoke: list[str]) -> None:
    assert run(*smoke, "--output-dir", "first", "--mlflow", "local").exit_code == 0
    assert Path("first/mlflow").is_dir()
    cache = ["data", "cache", smoke[-1], "--checkpoint", "first/checkpoint"]
    made = CliRunner().invoke(nsp, [*cache, "--output", "t.safetensors"])
    assert made.exit_code == 0, made.stderr
    words = shlex.split(made.stdout.splitlines()[-1].removeprefix("next: python train.py "))
    written = Path("t.safetensors").stat().st_mtime_ns
    second = run(*smoke, *words, "--output-dir", "second")
    assert second.exit_code == 0, second.stderr
    assert Path("t.safetensors").stat().st_mtime_ns == written
    assert not Path("second/tokenizer").exists()
    same = [Path(name, "checkpoint/vae/model.safetensors") for name in ("first", "second")]
    assert same[0].read_bytes() == same[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from-phase", "predictor"], "leaves out tokenizer; give the checkpoint"),
        (["--from-phase", "decoder"], "unknown phase 'decoder'"),
        (["--token-cache", "t.safetensors"], "which this phase would change"),
    ],
)
def test_phases_and_caches_that_do_not_fit_are_refused_at_once(
    smoke: list[str], options: list[str], message: str
) -> None:
    result = run(*smoke, *options)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert not Path("runs/smoke/run.json").exists()
