"""What training the family promises: all parts learn, a scale at a time or together, and resume."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.console.train_config import configure
from nsp.data.dataset import ImageDataset
from nsp.data.sources import open_source
from nsp.errors import ConfigError
from nsp.families.next_scale.config import ScalesSettings
from nsp.families.next_scale.latents import encoding, resized
from nsp.families.next_scale.objective import ScalesObjective
from nsp.family.objective import TokenCache, TrainingData
from nsp.family.recipe import Epochs, RunConfig
from nsp.training.latents import LatentDataset, cached_latents
from nsp.training.whole_run import train
from tests.families.next_scale.models import new_tiny_system, tiny_config
from tests.training.pictures import write_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def _run(pictures: Path, **options: object) -> RunConfig:
    run = configure("next_scale_smoke", None, data=str(pictures), **options)  # type: ignore[arg-type]
    return dataclasses.replace(run, tracking=dataclasses.replace(run.tracking, tensorboard=False))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "generator" / "model.safetensors")


def _rows(folder: Path, phase: str) -> list[dict[str, float]]:
    lines = (folder / phase / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_scales_asked_for_together_are_one_phase_and_those_in_a_row_have_their_own(
    pictures: Path,
) -> None:
    def phases(**options: object) -> list[tuple[str, object]]:
        run = _run(pictures, **options)
        return [(phase.name, dict(phase.objective)) for phase in run.phases]

    assert phases() == [("vae", {}), ("scale_0", {}), ("scales", {"first_scale": 1})]
    both = {"first_scale": 0, "last_scale": 1}
    assert phases(start_scale=0, end_scale=1) == [("vae", {}), ("scales", both)]
    assert phases(end_scale=0, progressive=True) == [("vae", {}), ("scale_0", {})]
    one = phases(start_scale=1, progressive=True)
    assert one == [("vae", {}), ("scale_1", {}), ("scale_2", {})]


@pytest.fixture(scope="module")
def progressive(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the autoencoder, then scale after scale."""
    folder = tmp_path_factory.mktemp("progressive") / "run"
    run = _run(pictures, progressive=True, val_dir=str(pictures))
    assert [phase.name for phase in run.phases] == ["vae", "scale_0", "scale_1", "scale_2"]
    assert train(run, folder).finished
    return folder


def test_progressive_training_reports_every_scale_and_the_free_running_chain(
    progressive: Path,
) -> None:
    assert any("scaling_factor" in row for row in _rows(progressive, "vae"))
    for scale in (1, 2):
        names = {name for row in _rows(progressive, f"scale_{scale}") for name in row}
        assert {f"scale_{scale}", f"held_out_scale_{scale}", f"held_out_chain_{scale}"} <= names
        assert list((progressive / f"scale_{scale}" / "samples").glob("*.png"))


def test_every_scale_has_a_schedule_of_its_own(progressive: Path) -> None:
    """Defect: the rate rose again after the first scale, and losses of scales were compared."""
    rates = [
        [row["lr"] for row in _rows(progressive, f"scale_{scale}") if "lr" in row]
        for scale in range(3)
    ]
    shapes = [[rate / max(phase) for rate in phase] for phase in rates]
    assert shapes[0] == pytest.approx(shapes[1])
    assert shapes[1] == pytest.approx(shapes[2])
    assert rates[0][-1] < max(rates[0])


def test_a_run_stopped_after_a_scale_resumes_at_the_next_exactly(
    progressive: Path, pictures: Path, tmp_path: Path
) -> None:
    """Defect: a resumed run began again at the first scale."""
    run = _run(pictures, progressive=True, val_dir=str(pictures))
    train(run, tmp_path / "run", last_phase="scale_1")
    assert not (tmp_path / "run" / "scale_2").exists()
    before = _rows(tmp_path / "run", "scale_0")
    train(run, tmp_path / "run", resume=True)
    assert _rows(tmp_path / "run", "scale_0") == before
    expected, found = _weights(progressive), _weights(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_sizes_and_scales_of_the_command_line_decide_the_run(pictures: Path) -> None:
    run = _run(
        pictures,
        initial_size=4,
        end_scale=0,
        batch_size=4,
        learning_rate=0.5,
        num_epochs_per_scale=2,
        save_every=1,
        num_workers=0,
    )
    assert run.model["initial_size"] == 4
    phase = run.phases[-1]
    assert (phase.name, phase.steps) == ("scales", Epochs(epochs=2))
    phase = run.in_steps(12).phases[-1]
    assert (phase.steps, phase.checkpoint_every) == (6, 3)
    assert (phase.batch_size, phase.optimizer.lr) == (4, 0.5)
    with pytest.raises(ConfigError, match="this model has 0 to 2"):
        _run(pictures, start_scale=3)
    with pytest.raises(ConfigError, match="is not an option of preset smoke"):
        configure("smoke", None, data=str(pictures), progressive=True)


def test_latents_are_of_antialiased_pictures_and_kept_in_a_file(
    pictures: Path, tmp_path: Path
) -> None:
    """Defect: pictures were made up to 64 times smaller without antialiasing."""
    lines = torch.zeros(1, 3, 16, 16)
    lines[..., ::4] = 1.0
    assert (resized(lines, 4) - 0.25).abs().max() < 0.1  # every fourth pixel alone is 0 or 1
    system = new_tiny_system()
    data = ImageDataset(open_source(pictures), 16, train=True, crop=False)
    made = cached_latents(encoding(system), data, TokenCache(tmp_path / "latents.safetensors"))
    again = cached_latents(
        encoding(system), data, TokenCache(tmp_path / "latents.safetensors", True)
    )
    assert [tuple(z.shape[1:]) for z in made] == [(4, 2, 2), (4, 4, 4), (4, 8, 8)]
    assert all(torch.equal(one, two) for one, two in zip(made, again, strict=True))
    with torch.no_grad():
        system.vae.autoencoder.encoder.conv_in.weight.add_(1)
    with pytest.raises(ConfigError, match="another autoencoder"):
        cached_latents(encoding(system), data, TokenCache(tmp_path / "latents.safetensors", True))


@pytest.mark.parametrize("base", ["flow", "regression"])
def test_what_is_random_about_a_sample_is_its_own_and_only_trained_scales_learn(
    pictures: Path, base: str
) -> None:
    system = new_tiny_system(tiny_config(base=base, dropout=0.0))
    data = ImageDataset(open_source(pictures), 16, train=True, crop=False)
    made = ScalesObjective(system, TrainingData(data), ScalesSettings(last_scale=1))
    made.train()
    items = [made.dataset()[index] for index in range(4)]
    batch = torch.utils.data.default_collate(items)
    keys = torch.arange(4) + 100
    whole = made({**batch, "key": keys})["loss"]
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        cut = {
            "condition": batch["condition"][part],
            "latents": [latent[part] for latent in batch["latents"]],
        }
        halves.append(made({**cut, "key": keys[part]})["loss"])
    torch.testing.assert_close(torch.stack(halves).mean(), whole, rtol=1e-5, atol=1e-5)
    whole.backward()
    assert {name.split(".")[0] for name, _ in made.trained.named_parameters()} == {
        *("base", "condition", "text_encoder", "predictor_0")
    }
    assert all(p.grad is None for p in system.generator.predictors[1].parameters())
    assert any(bool(p.grad.any()) for p in system.text_encoder.parameters() if p.grad is not None)


def test_held_out_pictures_are_marked_so_that_only_they_run_the_chain(pictures: Path) -> None:
    system = new_tiny_system()
    data = ImageDataset(open_source(pictures), 16, train=True, crop=False)
    prompts = system.encode_prompts(data.captions())
    assert LatentDataset(data, encoding(system), prompts, held_out=True)[0]["held_out"]
    assert not LatentDataset(data, encoding(system), prompts)[0]["held_out"]


def test_a_run_leaves_a_checkpoint_that_loads(progressive: Path) -> None:
    record = read_checkpoint(progressive / "checkpoint")
    assert record.load().vae.scaling_factor != 1.0
    assert set(record.notes["steps"]) == {"vae", "scale_0", "scale_1", "scale_2"}
