"""The course of a training as a picture: runs that went on, in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from nsp.console.curves import main, read_curves, smoothed
from nsp.errors import DataError


def write_log(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    file = folder / "log.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def logs(tmp_path: Path) -> list[Path]:
    """Two runs of a predictor, the second going on from the first, and a tokenizer."""
    first = [{"step": n, "ce": 7.0 - n / 10, "loss": 1.0} for n in (5, 10)]
    second = [{"step": 5, "ce": 5.0}, {"step": 5, "held_out_ce": 6.5}, {"step": 10, "ce": 4.5}]
    return [
        write_log(tmp_path / "one/tokenizer", [{"step": 10, "psnr_db": 20.0, "loss": 0.3}]),
        write_log(tmp_path / "one/predictor", first),
        write_log(tmp_path / "two/predictor", second),
    ]


def test_runs_of_a_phase_follow_one_another(logs: list[Path]) -> None:
    tokenizer, predictor = read_curves(logs)
    assert (tokenizer.phase, tokenizer.metric) == ("tokenizer", "psnr_db")
    assert (predictor.phase, predictor.metric) == ("predictor", "ce")
    assert predictor.steps.tolist() == [5, 10, 15, 20]
    assert predictor.values.tolist() == [6.5, 6.0, 5.0, 4.5]
    assert (predictor.held_out_steps.tolist(), predictor.held_out.tolist()) == ([15], [6.5])
    assert predictor.joints == (10,)


def test_a_spike_does_not_move_the_smooth_line() -> None:
    values = np.ones(40)
    values[20] = 100
    assert np.array_equal(smoothed(values), np.ones(40))


def test_the_command_writes_a_picture(logs: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "curves.png"
    result = CliRunner().invoke(main, [*map(str, logs), "--output", str(output)])
    assert result.exit_code == 0, result.output
    with Image.open(output) as image:
        assert image.width > 2 * image.height


def test_a_file_that_is_no_log_is_named(tmp_path: Path) -> None:
    other = write_log(tmp_path / "predictor", [{"loss": 1.0}])
    with pytest.raises(DataError, match="is not a log of a training phase"):
        read_curves([other])
