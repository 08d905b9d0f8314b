"""Some of the predictor's steps train only the first scales, by their shares."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nsp.errors import ConfigError
from nsp.families.var import objective
from nsp.family.recipe import GuardConfig, RunConfig
from nsp.family.recipes import preset
from nsp.training.whole_run import train
from tests.training.pictures import write_pictures


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """Ten predictor steps: half of them with two scales, a fifth with three, the rest with all."""
    run = preset("smoke")
    tokenizer, predictor = run.phases
    predictor = dataclasses.replace(
        predictor,
        steps=10,
        guard=GuardConfig(spike_ratio=2, window=2),
        objective={"prefixes": [{"num_scales": 2, "share": 0.5}, {"num_scales": 3, "share": 0.2}]},
    )
    data = dataclasses.replace(run.data, source=str(write_pictures(tmp_path / "pictures")))
    return dataclasses.replace(run, phases=(tokenizer, predictor), data=data)


def test_steps_train_scales_by_share_each_on_the_mean_over_its_tokens(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, whole = [], objective.predictor_loss

    def noting(*args: Any, num_scales: int | None = None, **options: Any) -> dict[str, Tensor]:
        trained.append(num_scales)
        return whole(*args, num_scales=num_scales, **options)

    monkeypatch.setattr(objective, "predictor_loss", noting)
    train(run, tmp_path / "run")
    counts = Counter(count for count in trained if count)
    assert counts == {2: 5, 3: 2, 4: 3}
    log = (tmp_path / "run/predictor/log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log]
    assert not any("rolled_back_to" in row for row in rows)
    steps = [row for row in rows if "lr" in row]
    assert len(steps) == 10
    for row in steps:  # each the mean over its own tokens, however many scales it trained
        assert row["loss"] == pytest.approx(row["ce"], rel=1e-3)


@pytest.mark.parametrize(
    ("prefixes", "problem"),
    [
        ([{"num_scales": 4, "share": 0.5}], "num_scales must be in 2..3"),
        ([{"num_scales": 1, "share": 0.5}], "num_scales must be in 2..3"),
        ([{"num_scales": 2, "share": 0.0}], "each share must be above 0"),
        ([{"num_scales": 2, "share": 0.5}, {"num_scales": 3, "share": 0.5}], "their sum below 1"),
    ],
)
def test_prefixes_that_make_no_sense_are_refused_before_the_first_step(
    run: RunConfig, tmp_path: Path, prefixes: list[dict[str, float]], problem: str
) -> None:
    tokenizer, predictor = run.phases
    predictor = dataclasses.replace(predictor, objective={"prefixes": prefixes})
    with pytest.raises(ConfigError, match=problem):
        train(dataclasses.replace(run, phases=(tokenizer, predictor)), tmp_path / "run")
    assert not list(tmp_path.glob("run/*/checkpoints/*"))
