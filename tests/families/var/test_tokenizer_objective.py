"""The tokenizer's objective: codes nobody uses, and pictures decoded from their first scales."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from nsp.errors import ConfigError
from nsp.families.var.tokenizer_objective import TokenizerSettings, decoded_latents
from nsp.training.presets import preset
from nsp.training.run import train
from tests.training.pictures import write_pictures


def test_codes_are_left_alone_after_the_stated_fraction(tmp_path: Path) -> None:
    run = preset("smoke")
    tokenizer = dataclasses.replace(
        run.phases[0], objective={"restart_every": 1, "restart_until": 0.5, "restart_share": 1.0}
    )
    data = dataclasses.replace(run.data, source=str(write_pictures(tmp_path / "pictures")))
    run = dataclasses.replace(run, phases=(tokenizer, run.phases[1]), data=data)
    train(run, tmp_path / "run", last_phase="tokenizer")
    log = (tmp_path / "run/tokenizer/log.jsonl").read_text().splitlines()
    moved = [row.get("codes_restarted") for row in map(json.loads, log) if "lr" in row]
    assert [count is None for count in moved] == [False, False, True, True]
    assert moved[0] > 0


def test_some_pictures_are_decoded_from_their_first_scales_only() -> None:
    latents = [torch.full((400, 1, 1, 1), float(scale)) for scale in range(4)]
    last = decoded_latents(latents, 0.5, torch.arange(400)).flatten()
    counts = last.long().bincount(minlength=4)
    assert counts[0] == 0  # at least half of the scales
    assert counts[3] == pytest.approx(200, abs=40)
    assert counts[1] == pytest.approx(100, abs=40)
    assert torch.equal(last, decoded_latents(latents, 0.5, torch.arange(400)).flatten())
    assert decoded_latents(latents, 0.0, torch.arange(400)).unique() == 3


def test_a_share_of_all_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefix_share"):
        TokenizerSettings(prefix_share=1.0)
