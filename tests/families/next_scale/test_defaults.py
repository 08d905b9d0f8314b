"""The options of the first implementation's trainer and what they are when they are not given."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nsp.console.train_command import main
from nsp.errors import ConfigError
from nsp.families.next_scale.config import VaeConfig
from nsp.families.next_scale.vae import new_autoencoder
from nsp.family.recipe import Epochs, RunConfig
from nsp.training.whole_run import resolve_precision
from tests.training.pictures import write_pictures

SMALL = VaeConfig(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder / "pictures")
    new_autoencoder(SMALL).save_pretrained(folder / "vae")
    return ["--data_dir", str(folder / "pictures"), "--vae", str(folder / "vae")]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, Path, dict[str, Any]]]:
    runs: list[tuple[RunConfig, Path, dict[str, Any]]] = []

    def train(run: RunConfig, folder: Path, **options: Any) -> None:
        runs.append((run, folder, options))
        raise KeyboardInterrupt

    monkeypatch.setattr("nsp.training.whole_run.train", train)
    return runs


def test_all_twenty_have_their_defaults(data: list[str], begun: list[Any]) -> None:
    CliRunner().invoke(main, ["--preset", "next_scale_sdxl", *data])
    ((run, folder, options),) = begun
    assert [run.model[n] for n in ("initial_size", "target_size", "scale_factor")] == [16, 1024, 2]
    (phase,) = run.phases
    assert (phase.name, phase.objective) == ("scales", {})
    assert (phase.batch_size, phase.optimizer.lr) == (8, 1e-4)
    epoch = Epochs(epochs=1)
    assert (phase.checkpoint_every, phase.validate_every) == (epoch, epoch)
    assert phase.steps == Epochs(epochs=10)
    assert (run.data.num_workers, run.data.validation, run.precision) == (4, None, "auto")
    folders = (str(folder), run.checkpoint_dir, run.tracking.log_dir)
    assert folders == ("outputs", "checkpoints", "logs")
    assert (options["resume"], options["device"]) == (False, None)


def test_each_of_them_has_an_effect_in_either_spelling(data: list[str], begun: list[Any]) -> None:
    given = {
        "initial_size": 8,
        "target_size": 256,
        "scale_factor": 2,
        "batch_size": 2,
        "learning_rate": 0.5,
        "num_epochs_per_scale": 3,
        "start_scale": 1,
        "end_scale": 2,
        "save_every": 2,
        "validate_every": 3,
        "num_workers": 0,
        "output_dir": "here",
        "checkpoint_dir": "steps",
        "log_dir": "noted",
        "device": "cpu",
        "val_dir": data[1],
    }
    for spelling in (lambda name: name, lambda name: name.replace("_", "-")):
        words = [word for n, value in given.items() for word in (f"--{spelling(n)}", str(value))]
        arguments = ["--preset", "next_scale_sdxl", *data, *words, "--progressive", "--fp16"]
        CliRunner().invoke(main, arguments)
    (run, folder, options), other = begun
    assert other == (run, folder, options)
    assert [run.model[n] for n in ("initial_size", "target_size")] == [8, 256]
    assert [phase.name for phase in run.phases] == ["scale_1", "scale_2"]
    phase = run.phases[0]
    assert phase.checkpoint_every == Epochs(epochs=2)
    assert phase.steps == phase.validate_every == Epochs(epochs=3)
    assert (phase.batch_size, phase.optimizer.lr) == (2, 0.5)
    assert (run.data.num_workers, run.data.validation, run.precision) == (0, data[1], "fp16")
    assert (str(folder), run.checkpoint_dir, run.tracking.log_dir) == ("here", "steps", "noted")
    assert options["device"] == "cpu"


def test_pictures_must_be_given(begun: list[Any]) -> None:
    result = CliRunner().invoke(main, ["--preset", "next-scale-sdxl"])
    assert result.exit_code != 0
    assert "give --data-dir" in result.output
    assert not begun


def test_a_stopped_resumption_says_how_its_own_run_goes_on(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, smoke = tmp_path / "mine", ["--preset", "next_scale_smoke", *data[:2], "--end-scale", "0"]
    arguments = [*smoke, "--output-dir", str(run), "--phase", "vae", "--device", "cpu"]
    assert CliRunner().invoke(main, arguments).exit_code == 0

    def stopped(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nsp.training.whole_run.train", stopped)
    result = CliRunner().invoke(main, ["--resume-from", str(run / "vae")])
    assert f"python train.py --resume --output-dir {run}" in result.output


def test_a_run_on_the_processor_takes_no_type_from_a_gpu_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert resolve_precision("auto", on_cpu=False) == "bf16"
    assert resolve_precision("auto", on_cpu=True) == "no"
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device"):
        resolve_precision("fp16", on_cpu=True)
