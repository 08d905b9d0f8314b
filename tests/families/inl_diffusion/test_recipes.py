"""`inl_vae` and `inl_dit` are the public trainings: their options, variables, records, losses."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.console.run_files import read_run
from nsp.console.train_command import main
from nsp.data.dataset import ImageDataset
from nsp.data.sources import open_source
from nsp.errors import CheckpointError
from nsp.families.inl_diffusion.config import SIZES, InlConfig, VaeConfig
from nsp.families.inl_diffusion.pretrained import read_vae, read_vae_config
from nsp.families.inl_diffusion.recipes import NAMES
from nsp.families.inl_diffusion.vae import Vae
from nsp.family.recipe import Epochs, RunConfig
from nsp.family.recipes import preset
from nsp.text.encoder import save_text_encoder
from tests.families.inl_diffusion.test_objective import new_system
from tests.training.pictures import write_pictures

VARIABLES = {
    "BATCH_SIZE": "24",
    "MAX_STEPS": "77",
    "LEARNING_RATE": "0.003",
    "WARMUP_STEPS": "5",
    "SAVE_EVERY": "11",
    "LOG_INTERVAL": "3",
    "IMAGE_SIZE": "64",
    "OUTPUT_DIR": "mine",
}


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


def config_of(made: RunConfig) -> InlConfig:
    return InlConfig.from_dict(made.model)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures in one folder, and the same without captions in another."""
    place = tmp_path_factory.mktemp("sets")
    write_pictures(place / "captioned")
    (place / "bare").mkdir()
    for path in (place / "captioned").glob("*.png"):
        (place / "bare" / path.name).write_bytes(path.read_bytes())
    return place


@pytest.fixture(scope="module")
def autoencoder(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small autoencoder, trained on pictures without captions."""
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    result = run(
        *("--preset", "inl_vae", "--dataset_path", pictures / "bare", "--image_size", 16),
        *("--base_channels", 32, "--max_steps", 3, "--batch_size", 4, "--output-dir", folder),
        *("--set", "model.vae.channel_multipliers=1,1", "--set", "model.latent_side=8"),
        *("--set", "model.vae.num_res_blocks=1", "--set", "vae.sample_every=3", "--anyway"),
        *("--num-workers", 0, "--device", "cpu", "--set", "vae.log_every=1"),
    )
    assert result.exit_code == 0, result.output
    return folder


def test_the_autoencoder_is_trained_as_the_public_one() -> None:
    made = preset("inl_vae", dataset="cifar10")
    (phase,) = made.phases
    optimizer = phase.optimizer
    assert made.data.source == "hf:uoft-cs/cifar10"
    assert (phase.steps, phase.batch_size, phase.checkpoint_every) == (100_000, 32, 10_000)
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.weight_decay) == (1e-4, 1000, 0.01)
    assert (optimizer.schedule, optimizer.final_ratio, optimizer.grad_clip) == ("cos", 0.0, 1.0)
    assert config_of(made).image_size_px == 256
    assert config_of(made).vae == SIZES["L"].vae


def test_the_transformer_is_trained_as_the_public_one(tmp_path: Path) -> None:
    made = preset("inl_dit", dataset="owner/set", start_from=str(tmp_path))
    (phase,) = made.phases
    optimizer = phase.optimizer
    assert made.data.source == "hf:owner/set"
    assert (phase.steps, phase.batch_size, phase.accumulate) == (500_000, 4 * 16, 4)
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.schedule) == (1e-4, 5000, "constant")
    assert (optimizer.weight_decay, optimizer.grad_clip) == (0.01, 1.0)
    assert config_of(made) == SIZES["L"]
    assert made.precision == "auto"


def test_the_public_options_are_accepted_as_they_are_written(
    tmp_path: Path, pictures: Path, autoencoder: Path
) -> None:
    vae = printed(
        tmp_path,
        *("--preset", "inl_vae", "--dataset", pictures / "bare", "--epochs", 3),
        *("--image_size", 128, "--batch_size", 8),
    )
    assert vae.phases[0].steps == Epochs(epochs=3)
    assert (config_of(vae).image_size_px, vae.phases[0].batch_size) == (128, 8)
    assert vae.data.source == str(pictures / "bare")
    dit = printed(
        tmp_path,
        *("--preset", "inl_dit", "--vae_path", autoencoder, "--dit_size", "S", "--batch_size", 8),
        *("--local_dataset", pictures / "captioned", "--max_steps", 9, "--lr", 2e-4),
        *("--image_size", 16),
    )
    (phase,) = dit.phases
    assert (phase.steps, phase.batch_size, phase.optimizer.lr) == (9, 8, 2e-4)
    assert config_of(dit).dit == SIZES["S"].dit
    assert (config_of(dit).latent_side, config_of(dit).image_size_px) == (8, 16)
    assert config_of(dit).vae == read_vae_config(autoencoder)


def test_variables_count_after_options_and_before_files_and_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = ("--preset", "inl_vae", "--dataset", "cifar10")
    (tmp_path / "run.yaml").write_text(run(*vae, "--max_steps", 5, "--print-config").stdout)
    file = ("--config", tmp_path / "run.yaml")
    assert printed(tmp_path, *file).phases[0].steps == 5
    for name, value in {**VARIABLES, "KL_WEIGHT": "0.5", "BASE_CHANNELS": "64"}.items():
        monkeypatch.setenv(name, value)
    for words in (vae, file):
        made = printed(tmp_path, *words)
        (phase,) = made.phases
        assert (phase.steps, phase.batch_size, phase.optimizer.lr) == (77, 24, 0.003)
        assert (phase.optimizer.warmup_steps, phase.checkpoint_every, phase.log_every) == (5, 11, 3)
        assert phase.objective["kl_weight"] == 0.5
        assert (config_of(made).image_size_px, config_of(made).vae.base_channels) == (64, 64)
        given = printed(tmp_path, *words, "--max_steps", 6, "--batch-size", 2, "--lr", 0.1)
        (phase,) = given.phases
        assert (phase.steps, phase.batch_size, phase.optimizer.lr) == (6, 2, 0.1)
    shown = run(*vae, "--help").stdout
    assert all(name in shown for name in VARIABLES)


def test_the_transformers_variables(
    tmp_path: Path, pictures: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"DIT_SIZE": "B", "CFG_DROPOUT": "0.2", "USE_BF16": "0", "GRADIENT_ACCUMULATION": "6"}
    for name, value in {**VARIABLES, **own, "TOKENIZER_PATH": "words"}.items():
        monkeypatch.setenv(name, value)
    data = ("--dataset", pictures / "captioned")
    made = printed(tmp_path, "--preset", "inl_dit", "--vae_path", autoencoder, *data)
    (phase,) = made.phases
    assert (phase.batch_size, phase.accumulate) == (24, 6)
    assert (phase.checkpoint_every, phase.sample_every) == (11, 11)
    assert phase.objective["cond_drop_rate"] == 0.2
    assert made.precision == "fp32"
    assert made.text_encoder["tokenizer"] == "words"
    assert config_of(made).dit == SIZES["B"].dit
    monkeypatch.setenv("USE_BF16", "1")
    again = printed(tmp_path, "--preset", "inl_dit", "--vae_path", autoencoder, *data)
    assert again.precision == "bf16"


def test_no_other_run_reads_the_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = printed(tmp_path, "--preset", "inl_diffusion")
    (tmp_path / "run.yaml").write_text((tmp_path / "printed.yaml").read_text())
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert printed(tmp_path, "--preset", "inl_diffusion") == before
    assert printed(tmp_path, "--config", tmp_path / "run.yaml") == before


def test_the_variable_for_the_folder_is_where_the_run_lies(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTPUT_DIR", "mine")
    small = ("--image_size", 16, "--base_channels", 32, "--max_steps", 1, "--batch_size", 4)
    fast = ("--num-workers", 0, "--device", "cpu", "--set", "tracking.tensorboard=false")
    data = ("--dataset", pictures / "bare", "--anyway")
    result = run("--preset", "inl_vae", *data, *small, *fast)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "mine/checkpoint/config.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inl_vae"], "inl_vae has no pictures of its own; give --dataset"),
        (["inl_dit", "--dataset", "x/y"], "give a trained one with --vae-path"),
        (["inl_vae", "--dataset", "x", "--dataset_path", "y"], "name different pictures"),
        (["inl_vae", "--dataset", "x", "--image_size", "100"], "must be a multiple of 8"),
        (["inl_dit", "--dataset", "x", "--vae_path", "none.pt"], "none.pt does not exist"),
        (["inl_dit", "--dataset", "x", "--dit_size", "M"], "'M' is not one of"),
    ],
)
def test_what_is_missing_or_wrong_is_said_in_one_line(words: list[str], said: str) -> None:
    result = run("--preset", *words)
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_autoencoder_comes_from_a_checkpoint_or_a_published_file(
    autoencoder: Path, pictures: Path, tmp_path: Path
) -> None:
    trained = load_file(autoencoder / "checkpoint/vae/model.safetensors")
    for place in (autoencoder, autoencoder / "checkpoint"):
        made = read_vae(place)
        assert made.config.channel_multipliers == (1, 1)
        assert all(torch.equal(t, trained[n]) for n, t in made.state_dict().items())
    wanted = Vae(VaeConfig(base_channels=32, latent_channels=8))
    about = {"image_size": 256, "base_channels": 32, "latent_dim": 8}
    state = {"step": 3, "model_state_dict": wanted.state_dict(), "config": about}
    torch.save(state, tmp_path / "vae_final.pt")
    assert read_vae(tmp_path / "vae_final.pt").config == wanted.config
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="it is not an INL-VAE"):
        read_vae(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is a folder of pictures"):
        read_vae(pictures / "bare")


def test_the_transformer_learns_on_the_autoencoders_latents_beside_a_frozen_text_encoder(
    autoencoder: Path, pictures: Path, tmp_path: Path
) -> None:
    data = ImageDataset(open_source(pictures / "captioned"), 8, train=True, crop=False)
    clip = new_system(data)
    assert clip.prompt_tokenizer is not None
    save_text_encoder(clip.text_encoder, tmp_path / "clip/text_encoder")
    clip.prompt_tokenizer.save(tmp_path / "clip/tokenizer")
    folder = tmp_path / "run"
    small = {"width": 32, "depth": 1, "num_heads": 2, "num_kv_heads": 1}
    sets = [f"model.dit.{name}={value}" for name, value in small.items()]
    sets += ["dit.objective.sample_steps=2", "dit.log_every=1", "precision=fp32"]
    result = run(
        *("--preset", "inl_dit", "--vae_path", autoencoder, "--text-encoder", tmp_path / "clip"),
        *("--local_dataset", pictures / "captioned", "--image_size", 16, "--max_steps", 2),
        *("--batch_size", 8, "--output-dir", folder, "--anyway", "--device", "cpu"),
        *(word for each in sets for word in ("--set", each)),
    )
    assert result.exit_code == 0, result.output
    made = read_checkpoint(folder / "checkpoint").load()
    kept = load_file(autoencoder / "checkpoint/vae/model.safetensors")
    assert all(torch.equal(t, kept[n]) for n, t in made.vae.state_dict().items())
    before = clip.text_encoder.state_dict()
    assert all(torch.equal(t, before[n]) for n, t in made.text_encoder.state_dict().items())
    assert made.config.dit.context_width == 16
    assert len([*folder.glob("text_states-*.npy")]) == 1
    assert (folder / "tokens.safetensors").is_file()
    assert recorded(folder, "dit") >= {*NAMES.values()}


def recorded(folder: Path, phase: str) -> set[str]:
    """Return the names of what TensorBoard has of a phase."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs" / phase))
    events.Reload()
    return {*events.Tags()["scalars"], *events.Tags()["images"]}


def test_records_have_the_public_names_and_lie_under_runs(autoencoder: Path) -> None:
    pytest.importorskip("tensorboard")
    assert recorded(autoencoder, "vae") >= {*NAMES.values()}
    assert not (autoencoder / "tensorboard").exists()
    rows = [json.loads(line) for line in (autoencoder / "vae/log.jsonl").read_text().splitlines()]
    assert {"loss", "reconstruction", "kl", "lr", "grad_norm"} <= {*rows[0]}


def test_a_run_of_the_public_recipes_is_resumed_with_its_variables(
    autoencoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_DIR", str(autoencoder))
    monkeypatch.setenv("LOG_INTERVAL", "2")
    result = run("--resume", "--output-dir", autoencoder, "--print-config")
    assert result.exit_code == 0, result.output
    assert "log_every: 2" in result.stdout
    result = run("--preset", "inl_vae", "--resume", "--print-config")
    assert result.exit_code == 0, result.output
    assert "log_every: 2" in result.stdout
