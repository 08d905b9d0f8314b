"""A recipe's signature is the command line of `train.py`, which `nsp train` is, too."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import accelerate.tracking
import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from click.testing import CliRunner, Result
from PIL import Image

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.cli import main as nsp
from nsp.console.run_files import as_yaml, read_run
from nsp.console.train_command import main
from nsp.console.train_config import PLACES, configure
from nsp.data.sources import open_source
from nsp.errors import ConfigError
from nsp.families.var import Var
from nsp.family.recipe import DataConfig, Epochs, RunConfig
from nsp.family.recipes import preset
from nsp.family.signature import Env, Range
from nsp.training.folder import check_folder
from nsp.training.other_trackers import check_trackers
from nsp.training.run_pictures import open_pictures
from nsp.training.whole_run import train

# Every option of `train.py` before recipes were the command line.
ALWAYS_THERE = [
    "--preset",
    "--config",
    "--data",
    "--data-dir",
    "--val-dir",
    "--num-workers",
    "--stream",
    "--token-cache",
    "--text-encoder",
    "--output-dir",
    "--checkpoint-dir",
    "--log-dir",
    "--vae",
    "--initial-size",
    "--target-size",
    "--scale-factor",
    "--batch-size",
    "--learning-rate",
    "--num-epochs-per-scale",
    "--progressive",
    "--start-scale",
    "--end-scale",
    "--save-every",
    "--validate-every",
    "--steps",
    "--phase",
    "--from-phase",
    "--seed",
    "--precision",
    "--fp16",
    "--device",
    "--start-from",
    "--parallel",
    "--compile",
    "--no-compile",
    "--activation-checkpointing",
    "--no-activation-checkpointing",
    "--mlflow",
    "--resume",
    "--resume-from",
    "--accept-changed-data",
    "--skip-bad-files",
    "--verbose",
    "-h",
    "--help",
]


OwnSeed = Annotated[int, "Seed.", Range(0), Env("MY_SEED")]


@pytest.fixture(autouse=True)
def _same_logging() -> Iterator[None]:
    handlers = list(logging.root.handlers)
    yield
    logging.root.handlers = handlers


def run(*options: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in options])


def printed(folder: Path, *options: object) -> RunConfig:
    """Return the run that a command line describes."""
    result = run(*options, "--print-config")
    assert result.exit_code == 0, result.output
    (folder / "printed.yaml").write_text(result.stdout)
    return read_run(folder / "printed.yaml")


def test_help_without_a_recipe_shows_a_group_for_each_with_options_of_its_own() -> None:
    shown = run("--help").stdout
    common, _, own = shown.partition("Options of --preset next_scale or next_scale_sdxl")
    assert "--seed" in common
    assert "--initial-size" not in common
    assert "--initial-size" in own
    assert "--initial-size" not in run("--help", "--preset", "smoke").stdout
    words = run("-h", "--recipe", "next-scale-sdxl").stdout.replace(",", " ").split()
    assert set(ALWAYS_THERE) - set(words) == set()


def test_nsp_train_is_the_same_program() -> None:
    options = ["--preset", "next-scale", "--end_scale", "1", "--print-config"]
    assert CliRunner().invoke(nsp, ["train", *options]).stdout == run(*options).stdout


def test_the_options_of_every_run_reach_their_places(tmp_path: Path) -> None:
    lengths = ("--epochs", 2, "--save-every", 1, "--batch_size", 4)
    given = printed(tmp_path, "--preset", "smoke", *lengths, "--mlflow", "local", "--no-compile")
    for phase in given.phases:
        assert (phase.batch_size, phase.steps) == (4, Epochs(epochs=2))
        assert phase.checkpoint_every == Epochs(epochs=1)
    assert (given.tracking.mlflow, given.compile) == ("local", False)
    values = given.to_dict() | values_of_phase(given)
    for place in PLACES.values():
        first = place.removeprefix("phases.*.").split(".")[0]
        assert first in values, place


def values_of_phase(given: RunConfig) -> dict[str, Any]:
    return given.phases[0].to_dict() | {"steps": None}


def test_a_printed_run_is_read_again_as_yaml_and_json(tmp_path: Path) -> None:
    expected = printed(tmp_path, "--preset", "smoke", "--learning-rate", 1e-5, "--seed", 7)
    assert expected.phases[0].optimizer.lr == 1e-5
    (tmp_path / "run.json").write_text(json.dumps(expected.to_dict()))
    assert read_run(tmp_path / "run.json") == expected
    text = (tmp_path / "printed.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text.replace("lr: 1.0e-05", "lr: 1e-5"))
    assert read_run(tmp_path / "run.yaml") == expected
    assert printed(tmp_path, "--config", tmp_path / "run.yaml") == expected


@pytest.mark.parametrize(
    ("option", "begun", "known"),
    [
        ("--preset", "next-scale-", ["next_scale_sdxl", "next_scale_smoke"]),
        ("--size", "d3", ["d30", "d36-s"]),
        ("--precision", "f", ["fp32", "fp16"]),
    ],
)
def test_presets_sizes_and_precisions_are_completed(
    option: str, begun: str, known: list[str]
) -> None:
    words = {"COMP_WORDS": f"nsp train {option} {begun}", "COMP_CWORD": "3"}
    told = CliRunner().invoke(nsp, env={"_NSP_COMPLETE": "bash_complete", **words}, prog_name="nsp")
    assert [line.partition(",")[2] for line in told.output.split()] == known


def test_a_file_with_a_key_twice_or_that_is_none_is_refused(tmp_path: Path) -> None:
    """YAML itself would take the last of two values; a pipe would be waited for."""
    text = as_yaml(preset("smoke"))
    file = tmp_path / "run.yaml"
    file.write_text(text.replace("seed: 0\n", "seed: 0\nseed: 1\n"))
    with pytest.raises(ConfigError, match=r"run.yaml, line \d+: 'seed' is there twice"):
        read_run(file)
    (tmp_path / "run.json").write_text('{"phases": [{"steps": 1, "steps": 2}]}')
    with pytest.raises(ConfigError, match=r"run.json: 'steps' is there twice"):
        read_run(tmp_path / "run.json")
    os.mkfifo(tmp_path / "pipe.yaml")
    result = run("--config", tmp_path / "pipe.yaml")
    assert result.exit_code == 2
    assert "there is no file" in result.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("family: [", "is not a YAML file"),
        ("- 1", "does not contain the fields of a run"),
        ("a: &x 1\nb: *x", "has an alias"),
        ("familie: var", "unknown key 'familie', nearest is family"),
    ],
)
def test_a_file_that_is_no_run_is_refused_in_one_line(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    result = run("--config", tmp_path / "run.yaml")
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "smok"], "unknown preset 'smok', nearest is smoke"),
        (
            ["--preset", "smoke", "--vae", "x"],
            "--vae is not an option of preset smoke; presets with",
        ),
        (["--set", "predicter.steps=3"], "nearest is predictor"),
        (["--size", "d17"], "'d17' is unknown, nearest is d16"),
        (["--preset", "next-scale", "--size", "emojis"], "nearest is emoji"),
        (["--preset", "next-scale", "--initial-size", "0"], "0 is not in the range"),
        (["--steps", "0"], "error: --steps 0: phase tokenizer: steps must be at least 1"),
        (["--learning-rate", "-1"], "error: --learning-rate -1.0: lr must be a finite number"),
        (["--seed", "1", "--precision", "fp8"], "error: --precision fp8: 'fp8' is not allowed"),
        (
            ["--set", "seed=1", "--set", "predictor.steps=0"],
            "error: --set predictor.steps=0: phase",
        ),
        (["--set", "model.predictor.depth=0"], "depth must be an integer of at least 1"),
        (["--from-phase", "predictr"], "nearest is predictor"),
        (["--steps", "3", "--epochs", "3"], "--steps and --epochs are both given"),
        (["--log-with", "wandbb"], "'wandbb' is unknown, nearest is wandb"),
        (["--val-share", "0.1"], "has a validation split of its own"),
        (["--stream", "--data", "x.tar", "--epochs", "3"], "x.tar"),
        (
            ["--preset", "next_patch", "--vq-ckpt", "no.pt", "--data", "x", "--batch-size", "7"],
            "error: --vq-ckpt no.pt does not exist",
        ),
        (["--preset", "latent_gpt", "--vqvae", "no.pt"], "error: --vqvae no.pt does not exist"),
    ],
)
def test_wrong_values_are_refused_in_one_line_before_the_first_step(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*options)
    assert result.exit_code in (1, 2)
    assert words in result.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("run.json"))


def test_a_value_comes_from_the_flag_then_the_variable_then_the_file_then_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(*, own_seed: OwnSeed = 1) -> RunConfig:
        return dataclasses.replace(preset("smoke"), seed=own_seed)

    def changed(given: RunConfig, *, own_seed: OwnSeed | None = None) -> RunConfig:
        return given if own_seed is None else dataclasses.replace(given, seed=own_seed)

    file = tmp_path / "run.yaml"
    file.write_text(run("--preset", "smoke", "--seed", 2, "--print-config").stdout)
    monkeypatch.setattr(Var, "recipes", {**Var().recipes, "mine": recipe})
    preset_alone = ["--preset", "mine"]
    assert printed(tmp_path, *preset_alone).seed == 1
    monkeypatch.setattr(Var, "run_options", staticmethod(changed))
    assert printed(tmp_path, "--config", file).seed == 2
    monkeypatch.setenv("MY_SEED", "3")
    assert printed(tmp_path, *preset_alone).seed == 3
    assert printed(tmp_path, *preset_alone, "--own-seed", 4).seed == 4
    assert "MY_SEED" in run("--help", *preset_alone).stdout
    assert printed(tmp_path, "--config", file).seed == 3
    assert printed(tmp_path, "--config", file, "--own-seed", 4).seed == 4


def test_the_size_of_any_family_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    assert printed(tmp_path, "--size", "d16").model["predictor"]["depth"] == 16
    tiny = printed(tmp_path, "--preset", "next-scale", "--size", "tiny", "--initial-size", 4)
    assert (tiny.model["target_size"], tiny.model["initial_size"]) == (16, 4)


def test_a_stopped_run_is_lengthened_in_epochs(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = configure("smoke", None, data=str(pictures), epochs=1)
    first = train(given, tmp_path / "run", last_phase="tokenizer")
    assert [phase.steps for phase in first.run.phases] == [12 // 8, 12 // 8]
    stored = json.loads((tmp_path / "run/run.json").read_text())
    assert [phase["steps"] for phase in stored["phases"]] == [1, 1]
    longer = configure(None, tmp_path / "run", epochs=3)
    with caplog.at_level(logging.INFO):
        made = train(longer, tmp_path / "run", last_phase="tokenizer", resume=True)
    assert "phases.0.epochs is now 3; it was None" in caplog.text
    assert "is now None" not in caplog.text
    assert made.run.phases[0].steps == 3
    assert configure("smoke", tmp_path / "run") == made.run


@pytest.mark.parametrize("place", ["code_path", "data_path"])
def test_the_options_that_began_a_run_continue_it(place: str, tmp_path: Path) -> None:
    """Own options of a recipe, beside --resume; no family has to know them a second time."""
    tokenizer, folder = tmp_path / "vq.pt", tmp_path / "run"
    tokenizer.write_bytes(b"")
    options: dict[str, Any] = {
        place: str(tmp_path / "data"),
        "vq_ckpt": tokenizer,
        "patch_level": 3,
        "image_size": 128,
        "scheduler": True,
        "ema": True,
        "cloud_save_path": tmp_path / "copies",
    }
    begun = configure("next_patch", None, **options, epochs=2).in_steps(1000)
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(begun.to_dict()))
    continued = configure("next_patch", folder, **options)
    check_folder(folder, continued, resume=True)
    assert continued.in_steps(1000) == begun
    moved = configure("next_patch", folder, **{**options, place: str(tmp_path / "moved")})
    assert moved.data.source == str(tmp_path / "moved")
    other = configure("next_patch", folder, **{**options, "patch_level": 1})
    with pytest.raises(ConfigError, match=r"objective.patch_level is 3, not 1"):
        check_folder(folder, other, resume=True)


def test_a_share_is_held_out_by_the_names_of_pictures_alone(pictures: Path, tmp_path: Path) -> None:
    def held_out(folder: Path, share: float) -> set[str]:
        found = open_pictures(DataConfig(source=str(folder), val_share=share), skip_bad_files=False)
        assert found.held_out is not None
        names = [{sample.name for sample in each.samples} for each in (found.held_out, found.train)]
        assert not names[0] & names[1]
        assert len(names[0] | names[1]) == len(open_source(folder))
        return names[0]

    some = held_out(pictures, 0.4)
    for path in list(pictures.iterdir())[::-1]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (16, 16)).save(tmp_path / "more.png")
    (tmp_path / "more.txt").write_text("another one")
    assert held_out(tmp_path, 0.4) - {"more.png"} == some
    assert held_out(pictures, 0.2) <= some
    assert len(held_out(pictures, 1e-9)) == 1
    with pytest.raises(ConfigError, match="omit one"):
        DataConfig(val_share=0.1, validation="there")


def test_classes_are_those_of_the_folders_and_found_by_name(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number, name in enumerate(["cat", "dog", "Golden Retriever"]):
        (data / name).mkdir(parents=True)
        for index in range(4):
            pixels = np.full((16, 16, 3), 60 * number + index, np.uint8)
            Image.fromarray(pixels).save(data / name / f"{index}.png")
    model = 'model.condition={"kind": "class", "num_classes": 1000}'
    given = configure("smoke", None, data=str(data), assignments=[model], steps=1)
    checkpoint = train(given, tmp_path / "run").checkpoint
    config = read_checkpoint(checkpoint).config["condition"]
    assert config["num_classes"] == 3
    assert sorted(config["id2label"]) == ["Golden Retriever", "cat", "dog"]

    def generate(*options: str) -> Result:
        where = ["--checkpoint", str(checkpoint), "--output-dir", str(tmp_path / "out"), "--json"]
        return CliRunner().invoke(nsp, ["generate", *where, *options])

    made = json.loads(generate("--class", "golden retriever", "--class", "dog").stdout)
    expected = [config["id2label"].index(name) for name in ("Golden Retriever", "dog")]
    assert [image["class_id"] for image in made["images"]] == expected
    wrong = generate("--class", "goldn retriever")
    assert wrong.exit_code == 2
    assert "nearest is Golden Retriever" in wrong.stderr


class Written(GeneralTracker):  # type: ignore[misc]
    """A tracker that remembers what it is given."""

    name, requires_logging_directory, main_process_only = "wandb", False, False
    rows: list[Any] = []  # noqa: RUF012

    def __init__(self, project: str) -> None:
        super().__init__()
        self.rows.append(project)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.rows.append(values["phases.0.name"])

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, *sorted(values)))

    @property
    def tracker(self) -> None:
        return None

    def finish(self) -> None:
        self.rows.append("finished")


def test_trackers_of_accelerate_get_every_report_with_steps_that_rise(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="comet_ml needs its package; run: pip install"):
        check_trackers(["comet_ml"])
    with pytest.raises(ConfigError, match="give --mlflow local"):
        check_trackers(["mlflow"])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Written)
    monkeypatch.setitem(accelerate.accelerator.LOGGER_TYPE_TO_CLASS, "wandb", Written)
    for module in ("accelerate.tracking", "nsp.training.other_trackers"):
        monkeypatch.setattr(f"{module}.get_available_trackers", lambda: [LoggerType("wandb")])
    values = config.to_dict()
    values["tracking"] = {"tensorboard": False, "log_with": ["wandb"], "experiment": "mine"}
    assert train(RunConfig.from_dict(values), tmp_path / "run").finished
    assert Written.rows[:2] == ["mine", "tokenizer"]
    assert Written.rows[-1] == "finished"
    reports = [row for row in Written.rows if isinstance(row, tuple)]
    assert [row[0] for row in reports if "tokenizer/loss" in row] == [1, 2, 3, 4]
    assert [row[0] for row in reports if "predictor/loss" in row] == [5, 6, 7, 8]


def test_a_recipe_is_a_function_of_python_too() -> None:
    made = preset("next_scale_smoke", end_scale=0, progressive=True, num_epochs_per_scale=2)
    assert [phase.name for phase in made.phases] == ["vae", "scale_0"]
    assert made.phases[1].steps == Epochs(epochs=2)
