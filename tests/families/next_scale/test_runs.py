"""What a run begins with and goes on from: an autoencoder, another model, its own saved steps."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.console.train_config import configure
from nsp.errors import ConfigError, DataError
from nsp.families.next_scale.config import VaeConfig
from nsp.families.next_scale.latents import encode_scales
from nsp.families.next_scale.objective import ScalesObjective
from nsp.families.next_scale.vae import new_autoencoder
from nsp.family.recipe import RunConfig
from nsp.training.whole_run import train
from tests.families.next_scale.models import new_tiny_system
from tests.training.pictures import write_pictures

# Four pixels a cell, where the preset's own has two.
WIDE = VaeConfig(
    block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    new_autoencoder(WIDE).save_pretrained(folder)
    return folder


def _run(pictures: Path, preset: str = "next_scale_smoke", **options: object) -> RunConfig:
    run = configure(preset, None, data=str(pictures), **options)  # type: ignore[arg-type]
    phases = tuple(
        dataclasses.replace(phase, sample_every=100, validate_every=100) for phase in run.phases
    )
    tracking = dataclasses.replace(run.tracking, tensorboard=False)
    return dataclasses.replace(run, phases=phases, tracking=tracking)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "generator" / "model.safetensors")


def test_a_run_that_died_within_a_phase_goes_on_exactly_dropout_included(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(pictures, end_scale=1)
    assert run.model["generator"]["dropout"] > 0
    train(run, tmp_path / "whole")
    after_step = ScalesObjective.after_step

    def dies(self: ScalesObjective, step: int) -> object:
        if step == 2:
            raise KeyboardInterrupt
        return after_step(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(ScalesObjective, "after_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(run, tmp_path / "died")
    train(run, tmp_path / "died", resume=True)
    expected, found = _weights(tmp_path / "whole"), _weights(tmp_path / "died")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture
def own_precision() -> Iterator[None]:
    """Let a run of another precision begin: accelerate allows one in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("own_precision")
def test_a_run_in_bfloat16_keeps_its_weights_in_float32(pictures: Path, tmp_path: Path) -> None:
    train(_run(pictures, end_scale=1, precision="bf16"), tmp_path / "run")
    weights = _weights(tmp_path / "run")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@torch.no_grad()
def test_latents_made_in_a_mixed_step_are_the_cached_ones() -> None:
    """Crops and flips change latents, so they are made within the step."""
    system = new_tiny_system()
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = encode_scales(system, pictures)
    with torch.autocast("cpu", torch.bfloat16):
        found = encode_scales(system, pictures)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_a_new_run_does_not_go_on_from_another_ones_saved_steps(
    pictures: Path, tmp_path: Path
) -> None:
    run = _run(pictures, end_scale=0, checkpoint_dir=str(tmp_path / "steps"))
    train(run, tmp_path / "first", last_phase="vae")
    with pytest.raises(ConfigError, match="steps/vae has another run's saved steps"):
        train(run, tmp_path / "second")
    train(run, tmp_path / "first", resume=True)


def test_a_run_without_any_autoencoder_is_refused(pictures: Path) -> None:
    with pytest.raises(ConfigError, match="give a trained one with --vae FOLDER"):
        _run(pictures, "next_scale_sdxl")


def test_a_given_autoencoder_stays_as_it_is_and_decides_what_sizes_fit(
    pictures: Path, vae_folder: Path, tmp_path: Path
) -> None:
    options = {"vae": vae_folder, "end_scale": 0}
    with pytest.raises(ConfigError, match="4 px per latent cell"):
        _run(pictures, target_size=20, **options)
    run = _run(pictures, target_size=16, **options)
    assert [phase.name for phase in run.phases] == ["scales"]
    train(run, tmp_path / "run")
    vae = read_checkpoint(tmp_path / "run" / "checkpoint").load().vae
    assert float(vae.scaling_factor) == 0.5
    for name, tensor in load_file(vae_folder / "diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(vae.autoencoder.state_dict()[name], tensor)

    start = str(tmp_path / "run" / "checkpoint")
    again = _run(pictures, target_size=16, start_from=start, from_phase="scale_0")
    train(again, tmp_path / "again", last_phase="scale_0")
    other = read_checkpoint(tmp_path / "again" / "checkpoint").load().vae
    assert float(other.scaling_factor) == 0.5


def test_bad_pictures_left_out_are_left_out_of_an_epoch(pictures: Path, tmp_path: Path) -> None:
    for path in pictures.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run = _run(tmp_path, num_epochs_per_scale=1, batch_size=4)
    for picture in sorted(tmp_path.glob("*.png"))[:5]:
        picture.write_bytes(b"no picture")
    with pytest.raises(DataError, match="--skip-bad-files"):
        train(run, tmp_path.with_name("run"), last_phase="vae")
    made = train(run, tmp_path.with_name("run"), last_phase="vae", skip_bad_files=True)
    assert [phase.steps for phase in made.run.phases] == [4, 7 // 4, 7 // 4]
