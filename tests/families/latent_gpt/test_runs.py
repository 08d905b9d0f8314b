"""The files of configs/, and recipes, train; what is missing is said before the first step."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.console.run_files import read_run
from nsp.console.train_command import main
from nsp.family.recipes import recipe
from nsp.raster.vq import VqTokenizer
from nsp.text.encoder import save_text_encoder
from tests.families.latent_gpt.models import new_system
from tests.families.latent_gpt.test_published import CONFIG, their_state

CONFIGS = Path(__file__).parents[3] / "configs"
# A model small enough for a test, on 16 px.
SMALL = (
    *("--set", "model.grid_side=8", "--set", "model.gpt.depth=1", "--set", "model.gpt.width=16"),
    *("--set", "model.gpt.num_heads=2", "--set", "predictor.batch_size=4", "--precision", "fp32"),
    *("--steps", "2", "--seed", "1", "--device", "cpu", "--num-workers", "0", "--val-share", "0.3"),
    *("--set", "predictor.log_every=1", "--set", "predictor.validate_every=2"),
    *("--set", "predictor.sample_every=2", "--set", "tracking.tensorboard=false"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, the weights of a small VQGAN, and a small CLIP."""
    place = tmp_path_factory.mktemp("latent_gpt")
    (place / "pictures").mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 99, 7)).save(place / f"pictures/{number}.png")
        (place / f"pictures/{number}.txt").write_text(f"colour number {number}")
    system = new_system()
    torch.save({"state_dict": their_state(VqTokenizer(CONFIG))}, place / "vqgan.ckpt")
    assert system.text_encoder is not None
    assert system.prompt_tokenizer is not None
    save_text_encoder(system.text_encoder, place / "clip/text_encoder")
    system.prompt_tokenizer.save(place / "clip/tokenizer")
    return place


def train(*options: object, expected: int = 0) -> str:
    result = CliRunner().invoke(main, [str(each) for each in options])
    assert result.exit_code == expected, result.output
    return result.output


def reported(phase: Path) -> set[str]:
    """Return the names of all numbers that a phase reported."""
    lines = (phase / "log.jsonl").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)}


@pytest.mark.parametrize(
    ("name", "experiment", "tags"),
    [
        ("base", "latent-gpt-pretrained-vqvae", {"phase": "1", "model_size": "500m"}),
        ("vqvae_pretrained", "latent-gpt-pretrained-vqvae", {"phase": "1", "model_size": "small"}),
        ("transformer_500m", "latent-gpt-custom-vqvae", {"phase": "3", "model_size": "500m"}),
    ],
)
def test_a_file_trains_and_says_what_it_is_in_mlflow(
    name: str, experiment: str, tags: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    parts = ("--vqvae", folder / "vqgan.ckpt", "--text-encoder", folder / "clip")
    data = ("--data-dir", folder / "pictures", "--output-dir", tmp_path / "run")
    train("--config", CONFIGS / f"{name}.yaml", *data, *parts, *SMALL)
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["tracking"]["experiment"] == experiment
    about = {"resolution": "256", "conditioning": "text_conditional", **tags}
    assert about.items() <= run["tracking"]["tags"].items()
    numbers = {"ce_loss", "perplexity", "held_out_perplexity", "held_out_null_ce_loss"}
    assert numbers <= reported(tmp_path / "run/predictor")
    made = read_checkpoint(tmp_path / "run/checkpoint").load()
    assert (made.config.grid_side, made.config.vq) == (8, CONFIG)
    settled = made.gpt.null_context.clone()
    made.settle()
    assert torch.allclose(settled, made.gpt.null_context, atol=1e-6)


def test_files_are_what_the_recipes_make() -> None:
    for name, preset in (("base", "pretrained"), ("transformer_500m", "custom")):
        made = recipe(f"latent_gpt_{preset}").run(data="flickr30k", vqvae=Path("v"))
        found, expected = read_run(CONFIGS / f"{name}.yaml"), made
        assert found.phases == expected.phases
        assert (found.data, found.seed, found.precision) == (made.data, made.seed, made.precision)
        assert found.sampling == made.sampling
        assert found.tracking.tags.items() <= made.tracking.tags.items()


def test_a_tokenizer_of_phase_2_is_what_phase_3_takes(folder: Path, tmp_path: Path) -> None:
    small = ("--steps", "2", "--device", "cpu", "--precision", "fp32", "--num-workers", "0")
    tiny = {"base_channels": 32, "channel_multipliers": "1,1", "codebook_size": 32}
    sizes = [f"model.vq.{key}={value}" for key, value in {**tiny, "latent_channels": 8}.items()]
    sets = [word for each in (*sizes, "tokenizer.batch_size=4") for word in ("--set", each)]
    data, anyway = ("--data-dir", folder / "pictures"), ("--set", "anyway=true")
    phase_2 = ("--preset", "latent_gpt_vqvae", "--output-dir", tmp_path / "vqvae")
    extra = ("--set", "model.grid_side=8", "--set", "tokenizer.log_every=1")
    train(*phase_2, *data, *small, *sets, *anyway, *extra)
    numbers = {"recon_loss", "codebook_usage", "perplexity"}
    assert numbers <= reported(tmp_path / "vqvae/tokenizer")
    phase_3 = ("--preset", "latent_gpt_custom", "--output-dir", tmp_path / "run")
    given = ("--vqvae", tmp_path / "vqvae/checkpoint", "--unconditional", "--patch-level", 2)
    train(*phase_3, *given, *data, *SMALL)
    made = read_checkpoint(tmp_path / "run/checkpoint").load()
    kept = read_checkpoint(tmp_path / "vqvae/checkpoint").load()
    assert made.config.text is None
    assert torch.equal(made.vq.quantize.embedding.weight, kept.vq.quantize.embedding.weight)


def test_the_tokenizer_comes_from_one_place(folder: Path) -> None:
    run = ("--preset", "latent_gpt_pretrained", "--data-dir", folder / "pictures")
    said = train(*run, expected=2)
    assert "untrained image tokenizer; give a trained one with --vqvae" in said
    said = train(*run, "--vqvae", "vqgan.ckpt", "--start-from", "run/checkpoint", expected=2)
    assert "give only one of --vqvae and --start-from" in said
