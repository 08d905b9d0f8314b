"""The tokenizer's objective: codes nobody uses, and pictures decoded from their first scales."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsp.data.dataset import ImageDataset
from nsp.data.sources import ImageSource
from nsp.errors import ConfigError
from nsp.families.var import decoder_objective, tokenizer_objective
from nsp.families.var.config import SIZES, with_condition
from nsp.families.var.learn import VarLearner
from nsp.families.var.system import VarSystem
from nsp.families.var.tokenizer_objective import TokenizerSettings, decoded_latents
from nsp.family.classes import ClassCondition
from nsp.family.objective import TrainingData
from nsp.family.recipes import preset
from nsp.training.whole_run import train
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


@pytest.mark.parametrize("phase", ["tokenizer", "decoder"])
def test_what_is_measured_is_decoded_from_all_scales(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []

    def noting(latents: Sequence[Tensor], share: float, key_B: Tensor) -> Tensor:
        shares.append(share)
        return decoded_latents(latents, share, key_B)

    for module in (tokenizer_objective, decoder_objective):
        monkeypatch.setattr(module, "decoded_latents", noting)
    system = VarSystem(with_condition(SIZES["tiny"], ClassCondition(num_classes=2)))
    data = ImageDataset(ImageSource((), (), ()), 16, train=True, crop=False)
    made = VarLearner().objective(phase, {"prefix_share": 0.5}, system, TrainingData(data))
    batch = {"image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "key": torch.arange(2)}
    made.train()(batch)
    made.eval()(batch)
    assert shares == [0.5, 0.0]


def test_a_share_of_all_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefix_share"):
        TokenizerSettings(prefix_share=1.0)
