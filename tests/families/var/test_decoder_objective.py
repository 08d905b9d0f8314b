"""The decoder phase: tokens stay what they were, pictures come nearer."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.errors import ConfigError
from nsp.families.var.decoder_objective import DecoderSettings
from nsp.family.recipe import RunConfig
from nsp.family.recipes import preset
from nsp.training.whole_run import train
from tests.training.pictures import write_pictures


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """A whole run, and then the decoder alone."""
    run = preset("smoke")
    decoder = dataclasses.replace(
        run.phases[0], name="decoder", steps=20, objective={"prefix_share": 0.2}
    )
    data = dataclasses.replace(run.data, source=str(write_pictures(tmp_path / "pictures")))
    return dataclasses.replace(run, phases=(*run.phases, decoder), data=data)


def test_a_decoder_phase_leaves_tokens_alone_and_brings_pictures_nearer(
    run: RunConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(run, folder, last_phase="predictor")
    before = read_checkpoint(folder / "checkpoint").load().state_dict()
    train(run, folder, resume=True)
    after = read_checkpoint(folder / "checkpoint").load().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("vae.decoder.", "vae.post_quant_conv.")) for name in changed)
    log = (folder / "decoder/log.jsonl").read_text().splitlines()
    errors = [row["mse"] for row in map(json.loads, log) if "mse" in row]
    assert sum(errors[-5:]) < sum(errors[:5])
    assert list((folder / "decoder/samples").glob("*.png"))


def test_a_share_of_all_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefix_share"):
        DecoderSettings(prefix_share=1.0)
