"""What random weights promise: one command, the same each time, and every part of them matters."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.benchmarks.random_model import find_size, main, random_system, write_random_model
from nsp.errors import ConfigError
from nsp.family.registry import family
from nsp.pipeline.pipeline import load_pipeline, torch_pipeline
from tests.export.small import new_small_checkpoint


def test_one_command_makes_a_model_that_runs_and_is_the_same_each_time(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        torch.manual_seed(len(name) + 5)  # whatever was drawn before
        done = CliRunner().invoke(main, ["--size", "tiny", "--output-dir", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        hashes.append(read_checkpoint(tmp_path / name).weights_hash())
    assert hashes[0] == hashes[1]
    assert f"nsp export --checkpoint {tmp_path / 'b'}" in done.output
    pipeline = load_pipeline(tmp_path / "a", "torch", device="cpu")
    assert pipeline.generate(class_ids=[3], seed=0).images.shape == (1, 16, 16, 3)


def test_every_gate_and_the_class_decide_the_logits() -> None:
    system = random_system(*find_size("tiny", "var"))
    config = system.config
    request = {"class_ids": [1, 4], "seed": 0, "trace": True, "guidance_scale": 1.0}

    def logits() -> np.ndarray:
        trace = (
            torch_pipeline(family("var"), system, device="cpu")
            .generate(**request, forced_tokens=np.zeros((2, config.num_tokens), np.int64))
            .trace
        )
        assert trace is not None
        return np.concatenate(trace.logits, axis=1)

    whole = logits()
    assert 3 < whole.std() < 30
    assert abs(np.corrcoef(whole[0].ravel(), whole[1].ravel())[0, 1]) < 0.9
    for block in system.predictor.blocks:
        with torch.no_grad():
            gates = block.ada_lin.linear.weight.view(6, config.predictor.width, -1)[:2]
            gates.zero_()
        closed = logits()
        assert np.abs(closed - whole).mean() > 0.05 * whole.std()
        whole = closed


def test_what_is_there_is_kept_and_nothing_trained_is_replaced(tmp_path: Path) -> None:
    folder, (var, config) = tmp_path / "w", find_size("tiny")
    write_random_model(folder, var, config)
    before = (folder / "config.json").stat().st_mtime_ns
    write_random_model(folder, var, config)
    assert (folder / "config.json").stat().st_mtime_ns == before
    other = dataclasses.replace(config, patch_nums=(1, 2))
    write_random_model(folder, var, other)
    assert read_checkpoint(folder).config["patch_nums"] == [1, 2]
    trained = new_small_checkpoint(tmp_path / "trained", num_classes=2)
    with pytest.raises(ConfigError, match="has another checkpoint"):
        write_random_model(trained, var, config)
    with pytest.raises(ConfigError, match="has other files"):
        write_random_model(tmp_path, var, config)


def test_the_size_for_cpus_has_the_published_schedule_and_a_small_decoder() -> None:
    from tests.artifacts.hand_counts import var_work

    _, config = find_size("w512")
    assert (config.num_tokens, config.image_size_px) == (680, 256)
    steps, cached = 0, 0
    for side in config.patch_nums:
        work = var_work(config, "step", {"G": 2, "L": side**2, "P": cached})
        assert work is not None
        steps, cached = steps + work.flops, cached + side**2
    decoder = var_work(config, "decoder", {"B": 1})
    assert decoder is not None
    assert steps == pytest.approx(83.5e9, rel=1e-2)
    assert decoder.flops < 0.15 * steps


def test_every_family_has_an_untrained_model_and_an_unknown_size_names_the_known_ones(
    tmp_path: Path,
) -> None:
    other, config = find_size("tiny", "next_scale")
    write_random_model(tmp_path / "other", other, config)
    assert read_checkpoint(tmp_path / "other").family.name == "next_scale"
    with pytest.raises(ConfigError, match=r"unknown size 'd17'; known: var: .*w512.*; next_scale:"):
        find_size("d17")
