"""Adapters of a transformer: trained, kept as files, merged, used by name, and never on others."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from nsp.artifacts.checkpoint import copy_in_half, read_checkpoint
from nsp.artifacts.systems import save_checkpoint
from nsp.cli import main
from nsp.errors import CheckpointError, ConfigError
from nsp.export.options import ExportOptions
from nsp.families.inl_diffusion.model import open_gates
from nsp.families.inl_diffusion.system import InlSystem
from nsp.family.recipe import LoraConfig
from nsp.family.recipes import preset
from nsp.pipeline.pipeline import load_pipeline
from nsp.training.whole_run import train
from nsp.weights.adapters import merge_adapter, read_adapter
from tests.training.pictures import write_pictures

_TARGETS = ("q_proj", "v_proj", "fc1")
_RANK, _ALPHA = 2, 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model."""
    folder = tmp_path_factory.mktemp("base")
    pictures = write_pictures(folder / "pictures")
    run = preset("inl_diffusion_smoke")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, source=str(pictures)))
    made = train(run, folder / "run", last_phase="vae", device="cpu").checkpoint
    system = read_checkpoint(made).load()
    torch.manual_seed(3)
    open_gates(system.dit)
    save_checkpoint(folder / "checkpoint", system, notes={}, sampling=run.sampling)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trains adapters on it."""
    run, folder = preset("inl_diffusion_smoke"), tmp_path_factory.mktemp("lora") / "run"
    lora = LoraConfig(rank=_RANK, alpha=_ALPHA, targets=_TARGETS)
    dit = run.phases[1]
    rates = dataclasses.replace(dit.optimizer, lr=0.02, schedule="constant")
    frozen = {**dit.objective, "train_text_encoder": False}
    phase = dataclasses.replace(
        dit, lora=lora, ema_decay=0.0, optimizer=rates, objective=frozen, sample_every=100
    )
    data = dataclasses.replace(run.data, source=str(base.parent / "pictures"))
    run = dataclasses.replace(run, data=data, phases=(phase,), start_from=str(base))
    assert train(run, folder, device="cpu").finished
    return folder


@torch.no_grad()
def predicted(system: InlSystem) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    dit = system.config.dit
    latent = torch.randn(2, 4, 4, 4, generator=rng)
    context = torch.randn(2, dit.context_length, dit.context_width, generator=rng)
    return system.dit(latent, torch.tensor([3, 700]), context)  # type: ignore[no-any-return]


def test_a_merged_adapter_equals_the_adapter(base: Path, trained: Path) -> None:
    """peft computes W x + alpha / r B A x; a checkpoint and --lora have the sum in W."""
    plain, merged = read_checkpoint(base).load(), read_checkpoint(base).load()
    beside = read_checkpoint(base).load()
    settings = peft.LoraConfig(r=_RANK, lora_alpha=_ALPHA, target_modules=list(_TARGETS))
    peft.inject_adapter_in_model(settings, beside.dit)
    state = load_file(trained / "dit/lora/adapter_model.safetensors")
    own = {n.removeprefix("base_model.model.dit."): t for n, t in state.items()}
    found = peft.set_peft_model_state_dict(beside.dit, own)
    assert not found.unexpected_keys
    merge_adapter(merged, read_adapter(trained / "dit/lora"))
    wanted = predicted(beside)
    assert (wanted - predicted(plain)).abs().max() > 1e-3
    torch.testing.assert_close(predicted(merged), wanted, atol=1e-5, rtol=0)
    kept = read_checkpoint(trained / "checkpoint").load()
    torch.testing.assert_close(predicted(kept), wanted, atol=1e-5, rtol=0)


def nsp(*words: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in words])


def test_generate_takes_an_adapter_with_a_checkpoint(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    shown = ("--prompt", "colour number 3", "--steps", 2, "--no-sheet", "--device", "cpu")
    lora = trained / "dit/lora"
    for name, words in (
        ("with", ("--checkpoint", base, "--lora", lora)),
        ("file", ("--checkpoint", base, "--lora", lora / "adapter_model.safetensors")),
        ("merged", ("--checkpoint", trained / "checkpoint")),
        ("without", ("--checkpoint", base)),
    ):
        result = nsp("generate", *words, *shown, "--output-dir", tmp_path / name, "--format", "npz")
        assert result.exit_code == 0, result.output
    arrays = {
        folder.name: np.load(next(folder.glob("*.npz")))["arr_0"].astype(int)
        for folder in tmp_path.iterdir()
    }
    assert abs(arrays["with"] - arrays["merged"]).max() <= 1
    assert (arrays["with"] == arrays["file"]).all()
    assert abs(arrays["with"] - arrays["without"]).max() > 1
    plain, adapted = load_pipeline(base), load_pipeline(base, lora=lora)
    assert plain.model_hash != adapted.model_hash


def test_a_half_copy_of_the_model_takes_its_adapter(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    copy_in_half(base, tmp_path / "half")
    load_pipeline(tmp_path / "half", lora=trained / "dit/lora")


def test_an_adapter_of_another_model_is_refused_in_one_line(
    base: Path, trained: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    lora = trained / "dit/lora"
    other = read_checkpoint(base).load()
    with torch.no_grad():
        other.dit.blocks[0].attn.q_proj.weight.add_(0.1)
    save_checkpoint(tmp_path / "other", other, notes={})
    for folder, said in (
        (tiny_checkpoint, "this one has no linear layer dit.blocks."),
        (tmp_path / "other", "trained on other weights of the same shape"),
    ):
        words = ("--checkpoint", folder, "--lora", lora, "--prompt", "x")
        result = nsp("generate", *words, "--output-dir", tmp_path / "out")
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert "is a LoRA of another model" in result.stderr
        assert said in result.stderr


def test_what_is_no_adapter_is_refused(base: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        read_adapter(base)
    place = tmp_path / "lora"
    shutil.copytree(trained / "dit/lora", place)
    state = load_file(place / "adapter_model.safetensors")
    name = next(iter(state))
    save_file({n: t for n, t in state.items() if n != name}, place / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="has not both halves"):
        read_adapter(place)
    save_file({**state, "x.weight": torch.zeros(2)}, place / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.weight is not a weight of a LoRA"):
        read_adapter(place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(CheckpointError, match="is not a plain LoRA"):
        read_adapter(place)


def test_an_export_takes_the_merged_checkpoint(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ExportOptions] = []

    def stopped(options: ExportOptions, **_: object) -> None:
        asked.append(options)
        raise ConfigError("stopped here")

    monkeypatch.setattr("nsp.export.run.export", stopped)
    words = ("--lora", trained / "dit/lora", "--engine-dir", tmp_path / "engines")
    for _ in range(2):  # the second replaces the first one's
        result = nsp("export", "--checkpoint", base, *words)
        assert "stopped here" in result.stderr
    assert asked[0].checkpoint == str(tmp_path / "engines-merged")
    merged = read_checkpoint(tmp_path / "engines-merged").load()
    kept = read_checkpoint(trained / "checkpoint").load()
    torch.testing.assert_close(predicted(merged), predicted(kept), atol=1e-6, rtol=0)
    shutil.copytree(base, tmp_path / "other-merged")
    words = ("--lora", trained / "dit/lora", "--engine-dir", tmp_path / "other")
    result = nsp("export", "--checkpoint", base, *words)
    assert "other-merged is another checkpoint" in result.stderr
    assert nsp("export", "--checkpoint", base, *words, "--dry-run").exit_code == 2


def test_engines_refuse_an_adapter_and_name_the_command_that_merges(
    trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines/manifest.json").write_text("{}")  # not read so far
    engines, lora = tmp_path / "engines", trained / "dit/lora"
    words = ("--engine-dir", engines, "--lora", lora, "--prompt", "x")
    result = nsp("generate", *words, "--output-dir", tmp_path / "out")
    assert result.exit_code == 2
    assert f"nsp export --checkpoint CHECKPOINT --lora {lora} --engine-dir {engines}" in (
        result.stderr
    )
    assert len(result.stderr.splitlines()) == 1
