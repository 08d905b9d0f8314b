"""`nsp generate` and `train.py` take every option of the family, in both spellings."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from nsp import cli, train
from nsp.data.image_files import read_metadata
from tests.families.next_scale.models import new_tiny_checkpoint

TRAIN_OPTIONS = (
    *("data_dir", "val_dir", "output_dir", "checkpoint_dir", "log_dir", "initial_size"),
    *("target_size", "scale_factor", "batch_size", "learning_rate", "num_epochs_per_scale"),
    *("progressive", "start_scale", "end_scale", "save_every", "validate_every", "resume_from"),
    *("fp16", "device", "num_workers"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_tiny_checkpoint(tmp_path_factory.mktemp("next") / "checkpoint")


def _generate(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.main, ["generate", *words], catch_exceptions=False)
    return result.exit_code, result.output


def _side(path: Path) -> int:
    with Image.open(path) as image:
        return image.width


def test_generate_without_a_prompt_uses_the_familys_defaults(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["--checkpoint", str(checkpoint), "--device", "cpu", "--save_intermediates"]
    words += ["--initial_size", "2", "--target_size", "16", "--scale_factor", "2"]
    code, output = _generate(*words, "--output_dir", str(out), "--json")
    assert code == 0, output
    image = json.loads(output[output.index("{") :])["images"][0]
    assert (image["seed"], image["prompt"]) == (
        *(42, "a beautiful landscape with mountains and a lake"),
    )
    assert [_side(path) for path in sorted((out / "scales").glob("*.png"))] == [4, 8, 16]
    assert read_metadata(Path(image["path"]))["family"] == "next_scale"


def test_a_smaller_target_stops_at_an_earlier_scale_and_others_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    words = ["--checkpoint", str(checkpoint), "--device", "cpu", "--output-dir", str(tmp_path)]
    code, output = _generate(*words, "--text_prompt", "", "--target-size", "8", "--seed", "1")
    assert code == 0, output
    assert _side(tmp_path / "000_no-prompt_seed1.png") == 8
    code, output = _generate(*words, "--target-size", "12")
    assert (code, "makes images of 4, 8, 16 px; nearest: " in output) == (2, True), output
    code, output = _generate(*words, "--initial-size", "4")
    assert (code, "this model has 2" in output) == (2, True), output
    code, output = _generate(*words, "--top-k", "5")
    assert (code, "--top-k is not a setting of family next_scale" in output) == (2, True), output


def test_train_has_every_option_in_both_spellings() -> None:
    help_text = CliRunner().invoke(train.main, ["--help"]).output
    for name in TRAIN_OPTIONS:
        assert f"--{name.replace('_', '-')}" in help_text
    result = CliRunner().invoke(
        train.main, ["--preset", "next_scale", "--target_size", "100", "--data_dir", "nowhere"]
    )
    assert result.exit_code == 2
    assert "nearest target_size: 64 or 128" in result.output
