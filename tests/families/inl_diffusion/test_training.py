"""The shared trainer trains both phases: in parts, in bf16, averaged, and on two processes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nsp.benchmarks.rates.training import measure_phases
from nsp.errors import ConfigError
from nsp.export.size_plan import _recipe
from nsp.family.recipe import RunConfig
from nsp.family.recipes import preset
from nsp.family.registry import family
from nsp.training.whole_run import train
from tests.training.pictures import write_pictures
from tests.training.test_distributed import reports, weights
from tests.training.test_distributed import run as run_processes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def new_run(pictures: Path, changes: dict[str, Any] | None = None, **fields: Any) -> RunConfig:
    """Return two steps of each phase, without samples."""
    run = preset("inl_diffusion_smoke")
    quiet: dict[str, Any] = {"steps": 2, "sample_every": 100, "validate_every": 100}
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, source=str(pictures)),
        phases=tuple(dataclasses.replace(each, **quiet, **(changes or {})) for each in run.phases),
        tracking=dataclasses.replace(run.tracking, tensorboard=False),
        **fields,
    )


@pytest.fixture(scope="module")
def plain(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert train(new_run(pictures), folder, device="cpu").finished
    return folder


def test_a_batch_in_parts_trains_as_a_whole_one(
    pictures: Path, plain: Path, tmp_path: Path
) -> None:
    train(new_run(pictures, {"accumulate": 4}), tmp_path / "run", device="cpu")
    for name in ("loss", "grad_norm"):
        assert reports(tmp_path / "run", name) == pytest.approx(reports(plain, name), rel=2e-5)


def test_bf16_trains_as_fp32_up_to_its_rounding(
    pictures: Path, plain: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(new_run(pictures).to_dict()))
    run_processes(pictures, tmp_path / "run", "--precision", "bf16", config=file)
    found, wanted = reports(tmp_path / "run", "loss"), reports(plain, "loss")
    assert found != wanted
    assert found == pytest.approx(wanted, rel=2e-2)  # bf16 has 8 bits


def test_a_checkpoint_has_the_averaged_weights(pictures: Path, plain: Path, tmp_path: Path) -> None:
    """The average does not change the training itself."""
    train(new_run(pictures, {"ema_decay": 0.0}), tmp_path / "run", device="cpu")
    assert reports(tmp_path / "run", "loss") == reports(plain, "loss")
    live, averaged = weights(tmp_path / "run"), weights(plain)
    name = "dit/final_layer.linear.weight"  # begins at zero, so that its average is smaller
    assert 0 < averaged[name].norm() < live[name].norm()
    assert torch.equal(live["vae/encoder.conv_in.weight"], averaged["vae/encoder.conv_in.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(
    pictures: Path, plain: Path, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(new_run(pictures).to_dict()))
    folder = tmp_path / "run"
    run_processes(pictures, folder, "--parallel", kind, processes=2, config=file)
    for name in ("loss", "grad_norm"):
        # The order of additions is all that differs.
        assert reports(folder, name) == pytest.approx(reports(plain, name), rel=2e-5)
    ours, theirs = weights(folder), weights(plain)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=0, msg=name)


@pytest.mark.slow
def test_two_processes_share_the_states_of_a_frozen_encoder(pictures: Path, tmp_path: Path) -> None:
    """Also with the prompt "" as null condition, whose learned one is then not trained."""
    run = new_run(pictures)
    model = {**run.model, "null_condition": "empty_prompt"}
    frozen = {"train_text_encoder": False, "cond_drop_rate": 0.5}
    vae, dit = run.phases
    phases = (dataclasses.replace(vae, steps=1), dataclasses.replace(dit, objective=frozen))
    run = dataclasses.replace(run, model=model, phases=phases)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run.to_dict()))
    train(run, tmp_path / "alone", device="cpu")
    folder = tmp_path / "run"
    run_processes(pictures, folder, processes=2, config=file)
    assert reports(folder, "loss") == pytest.approx(reports(tmp_path / "alone", "loss"), rel=2e-5)
    assert len([*folder.glob("text_states-*.npy")]) == 1


def test_every_published_size_is_planned_as_inl_dit_trains_it() -> None:
    owner = family("inl_diffusion")
    for size in ("S", "B", "L", "XL", "XXL", "L-MoE", "XL-MoE"):
        name, run = _recipe(owner, owner.sizes[size].to_dict(), size)
        assert name == "inl_dit"
        assert run.model == owner.sizes[size].to_dict()
    assert _recipe(owner, owner.sizes["emoji"].to_dict(), "emoji")[0] == "inl_diffusion"


@pytest.mark.slow
def test_training_is_measured_by_size_with_latents_cached_or_not(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = new_run(pictures)
    monkeypatch.setattr("nsp.benchmarks.rates.training.named_run", lambda name: small)
    settings: dict[str, Any] = {"steps": 2, "sizes": ("tiny",), "batch_size": 4}
    (cached,) = measure_phases("inl_diffusion_smoke", ("dit",), **settings)
    (live,) = measure_phases("inl_diffusion_smoke", ("dit",), **settings, uncached=True)
    assert (cached.size, cached.batch_size, cached.memory_gib) == ("tiny", 4, None)
    assert live.flops_per_image > cached.flops_per_image > 0  # the autoencoder reads the pictures
    assert "images/s" in cached.words
    with pytest.raises(ConfigError, match="size of family inl_diffusion"):
        next(measure_phases("x", (), steps=1, sizes=("M",)))
