"""A run goes on only with an image tokenizer that beats a plain colour, and says what it drew."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.console.train_command import main
from nsp.data.dataset import ImageDataset
from nsp.data.sources import open_source
from nsp.errors import TrainingError
from nsp.families.var import Var
from nsp.families.var.learn import VarLearner
from nsp.families.var.system import VarSystem
from nsp.family.recipe import RunConfig
from nsp.family.recipes import default_recipe, preset
from nsp.training import run_phase
from nsp.training.verdicts import by_chance, judge_generator, judge_tokenizer, num_asked
from nsp.training.whole_run import train
from tests.models import new_tiny_checkpoint

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


class Copying(Var):
    """Its image tokenizer loses nothing."""

    @property
    def learner(self) -> VarLearner:
        return _Copying()


class _Copying(VarLearner):
    def reconstruct(self, system: VarSystem, pictures_BHW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return pictures_BHW3


def halves(folder: Path, captions: list[str]) -> Path:
    """Write a picture for every caption: its first colour beside black, its number in a corner."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, caption in enumerate(captions):
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[:, :8] = COLOURS[caption.split()[0]]
        pixels[0, 15] = number
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(caption)
    return folder


def dataset(folder: Path) -> ImageDataset:
    return ImageDataset(open_source(folder), 16, train=False, crop=False)


def test_a_tokenizer_is_measured_beside_each_pictures_mean_colour(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    system = read_checkpoint(tiny_checkpoint).load()
    data = dataset(halves(tmp_path / "set", ["red", "green", "blue"]))
    good = judge_tokenizer(Copying(), system, data, seed=0, sheet=tmp_path / "sheet.png")
    assert good.is_enough
    assert good.numbers["psnr_db"] == pytest.approx(100)
    # Half at 0 and half at v: v / 2 away from the mean everywhere, in the largest channel.
    assert good.numbers["plain_psnr_db"] == pytest.approx(12, abs=1.5)
    assert (tmp_path / "sheet.png").is_file()
    bad = judge_tokenizer(Var(), system, data, seed=0)  # its weights are random
    assert not bad.is_enough
    assert "worse" in bad.says


def test_pictures_that_are_plain_colours_are_said_to_be(
    pictures: Path, tiny_checkpoint: Path
) -> None:
    system = read_checkpoint(tiny_checkpoint).load()
    verdict = judge_tokenizer(Copying(), system, dataset(pictures), seed=0)
    assert not verdict.is_enough
    assert "hardly more than plain colours" in verdict.advice


def test_a_hit_is_any_picture_of_the_caption_and_chance_counts_them(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = ["red", "red", "red", "green", "blue", "blue"]
    data = dataset(halves(tmp_path / "set", captions))
    shown = {data[n]["caption"]: data[n]["image"].movedim(0, -1).numpy() for n in range(6)}
    monkeypatch.setattr(
        "nsp.training.verdicts._drawn",
        lambda _, __, ___, asked, **____: [
            shown[name if name != "green" else "red"] for name in asked
        ],
    )
    system = read_checkpoint(tiny_checkpoint).load()
    verdict = judge_generator(Var(), system, data, seed=0, sampling={})
    assert verdict is not None
    assert verdict.numbers["recall_at_1"] == pytest.approx(2 / 3)
    assert verdict.numbers["chance"] == pytest.approx((3 + 1 + 2) / 3 / 6)


@pytest.mark.parametrize(
    ("hits", "chance", "praised"),
    [(0, 1 / 2000, False), (1, 1 / 2000, False), (2, 1 / 2000, True), (9, 1 / 8, False)],
)
def test_only_hits_that_chance_does_not_explain_are_more_than_chance(
    hits: int, chance: float, praised: bool
) -> None:
    """One hit of 64 at 1 in 2000 is 31 times chance, and yet 3 % of random models have it."""
    assert (by_chance(hits, 64, chance) < 0.025) is praised


def test_pictures_that_all_look_the_same_judge_nothing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = halves(tmp_path / "set", ["red"])
    (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "copy.txt").write_text("red again")
    system = read_checkpoint(tiny_checkpoint).load()
    verdict = judge_generator(Var(), system, dataset(folder), seed=0, sampling={})
    assert verdict is not None
    assert "look the same" in verdict.says


def test_fewer_large_pictures_are_judged() -> None:
    assert [num_asked(side) for side in (16, 64, 256, 512, 1024)] == [64, 64, 64, 16, 8]


def test_a_tokenizer_no_better_than_a_plain_colour_stops_the_run_unless_anyway(
    tmp_path: Path,
) -> None:
    run = preset("smoke")
    data = dataclasses.replace(run.data, source=str(halves(tmp_path / "set", ["red", "blue"] * 6)))
    careful = dataclasses.replace(run, data=data, anyway=False)
    for resume in (False, True):  # nor does it go on when it is only resumed
        with pytest.raises(TrainingError, match=r"phase tokenizer: rebuilds .* --anyway"):
            train(careful, tmp_path / "run", resume=resume)
    assert not (tmp_path / "run/predictor").exists()
    assert train(dataclasses.replace(careful, anyway=True), tmp_path / "run", resume=True).finished
    assert train(careful, tmp_path / "run", resume=True).finished  # all phases are made
    kept = json.loads((tmp_path / "run/predictor/verdict.json").read_text())
    assert "times chance" in kept["says"]


def test_a_run_that_died_before_its_verdict_is_judged_when_it_is_resumed(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    verdict = tmp_path / "run/tokenizer/verdict.json"
    train(config, tmp_path / "run", last_phase="tokenizer")
    assert verdict.is_file()
    longer = dataclasses.replace(config.phases[0], steps=5)
    config = dataclasses.replace(config, phases=(longer, *config.phases[1:]))
    with monkeypatch.context() as patch:
        patch.setattr(run_phase, "judge_phase", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", resume=True)
    assert not verdict.exists()  # that on fewer steps is gone
    careful = dataclasses.replace(config, anyway=False)
    with pytest.raises(TrainingError, match=r"phase tokenizer: rebuilds .* --anyway"):
        train(careful, tmp_path / "run", resume=True)
    assert verdict.is_file()
    assert not (tmp_path / "run/predictor").exists()


def test_a_phase_is_not_judged_when_a_later_one_was_built_on_it(
    config: RunConfig, tmp_path: Path
) -> None:
    assert train(config, tmp_path / "run").finished
    (tmp_path / "run/tokenizer/verdict.json").unlink()
    careful = dataclasses.replace(config, anyway=False)
    assert train(careful, tmp_path / "run", resume=True).finished
    assert not (tmp_path / "run/tokenizer/verdict.json").exists()


def test_a_run_begins_only_with_a_tokenizer_that_shows_the_pictures(
    config: RunConfig, tmp_path: Path
) -> None:
    start = new_tiny_checkpoint(tmp_path / "start")
    record = read_checkpoint(start)
    folder = halves(tmp_path / "set", ["red", "blue"] * 6)
    run = dataclasses.replace(
        config,
        model=dict(record.config),
        data=dataclasses.replace(config.data, source=str(folder)),
        phases=config.phases[1:],
        start_from=str(start),
        anyway=False,
    )
    with pytest.raises(TrainingError, match=r"the image tokenizer of .*--preset emoji.*--anyway"):
        train(run, tmp_path / "run")
    assert (tmp_path / "run/reconstructions.png").is_file()
    assert not (tmp_path / "run/run.json").exists()
    assert train(dataclasses.replace(run, anyway=True), tmp_path / "run").finished


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


def test_own_pictures_finetune_the_bundled_model_and_the_first_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = [sys.executable, str(ROOT / "examples/draw_pictures.py"), str(tmp_path / "set")]
    subprocess.run([*drawn, "--count", "16"], check=True)
    with caplog.at_level("INFO"):
        done = command("--data", tmp_path / "set", "--output-dir", tmp_path / "run", "--steps", "1")
    assert done.exit_code == 0, done.stderr
    first, *rest = caplog.messages
    assert "finetune continues the bundled model" in first
    assert "--preset emoji trains all parts from new weights" in first
    assert any("rebuilds the pictures at" in line and "better" in line for line in rest)
    assert "times chance" in done.stdout  # the final report
    assert (tmp_path / "run/reconstructions.png").is_file()
    assert read_checkpoint(tmp_path / "run/checkpoint").notes["steps"]["predictor"] == 1


def test_presets_of_a_few_steps_go_on_whatever_they_have_learnt() -> None:
    rough = [preset(name).anyway for name in ("quick", "smoke", "next-scale-smoke")]
    assert rough == [True] * 3
    assert not preset("emoji").anyway
    assert not preset("finetune").anyway


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "emoji"),
        ({"data": "emoji"}, "emoji"),
        ({"data": "pictures"}, "finetune"),
        ({"data": "pictures", "start_from": "checkpoint"}, "finetune"),
        ({"data": "pictures", "size": "d16"}, "emoji"),
        ({"data": "pictures", "text_encoder": "clip"}, "emoji"),
    ],
)
def test_only_own_pictures_for_the_bundled_models_size_finetune(
    options: dict[str, str], expected: str
) -> None:
    assert default_recipe(options) == expected


def test_class_folders_give_a_model_of_prompts_their_names(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for colour in COLOURS:
        folder = halves(tmp_path / "set" / colour, [colour] * 4)
        for file in folder.glob("*.txt"):
            file.unlink()
    data = dataclasses.replace(config.data, source=str(tmp_path / "set"))
    with caplog.at_level("INFO"):
        train(dataclasses.replace(config, data=data), tmp_path / "run")
    assert "captions: the names of 3 class folders (blue, green, red)" in caplog.text


def test_too_few_pictures_for_a_batch_say_what_fits(tmp_path: Path) -> None:
    folder = halves(tmp_path / "set", ["red", "green", "blue"])
    done = command("--data", folder, "--output-dir", tmp_path / "run")
    assert done.exit_code == 2
    assert "give --batch-size 3 or less" in done.stderr
