"""A loss that went wrong sends a run back to its last saved step, by the rule that is stated."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nsp.errors import ConfigError, TrainingError
from nsp.families.var.tokenizer_objective import TokenizerObjective
from nsp.family.recipe import GuardConfig, RunConfig
from nsp.training.guard import LossGuard
from nsp.training.whole_run import train


def test_a_loss_far_above_the_usual_is_a_spike() -> None:
    guard = LossGuard(GuardConfig(spike_ratio=3, window=4))
    assert guard.judge(100.0) is None  # nothing to compare with yet
    assert [guard.judge(loss) for loss in (1.0, 1.1, 0.9, 1.0)] == [None] * 4
    assert guard.judge(2.9) is None
    assert "3 times the usual" in str(guard.judge(3.5))
    assert 3.5 not in guard.memory
    assert "nan" in str(guard.judge(math.nan))


def test_without_a_ratio_only_what_is_not_finite_counts() -> None:
    guard = LossGuard(GuardConfig(spike_ratio=0, window=2))
    assert [guard.judge(loss) for loss in (1.0, 1.0, 1e9)] == [None] * 3
    assert guard.judge(math.inf) is not None


def test_a_loss_that_compares_with_no_other_must_only_be_finite() -> None:
    guard = LossGuard(GuardConfig(spike_ratio=3, window=2))
    guard.judge(1.0)
    assert guard.judge(1e9, spikes=False) is None
    assert guard.memory == [1.0]
    assert guard.judge(math.nan, spikes=False) is not None


@pytest.mark.parametrize("values", [{"spike_ratio": 0.5}, {"window": 1}, {"max_rollbacks": -1}])
def test_a_rule_that_makes_no_sense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GuardConfig(**values)


def spoiled(monkeypatch: pytest.MonkeyPatch, *, calls: set[int]) -> None:
    """Make the tokenizer's loss nan in the training passes of these numbers."""
    forward, count = TokenizerObjective.forward, 0

    def failing(self: TokenizerObjective, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        nonlocal count
        metrics = forward(self, batch)
        if self.training:
            count += 1
            if count in calls:
                metrics["loss"] = metrics["loss"] * math.nan
        return metrics

    monkeypatch.setattr(TokenizerObjective, "forward", failing)


def test_nan_goes_back_to_the_saved_step_and_leaves_the_batches_out(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoiled(monkeypatch, calls={4})  # of step 3; steps 0 and 1 are saved
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path / "run", last_phase="tokenizer")
    assert "going back to step 2 and skipping the batches since (rollback 1 of" in caplog.text
    lines = (tmp_path / "run/tokenizer/log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert any(row.get("rolled_back_to") == 2 for row in rows)
    assert rows[-1]["step"] == 4
    assert math.isfinite(rows[-1]["loss"])
    newest = tmp_path / "run/tokenizer/checkpoints/step00000004/state.pt"
    state = torch.load(newest, weights_only=True)
    assert state["rollbacks"] == 1
    assert state["offset"] >= 2
    assert all(tensor.isfinite().all() for tensor in state["trained"].values())


def test_nan_before_the_first_saved_step_stops_the_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, calls={1})
    with pytest.raises(TrainingError, match="before the first saved step; lower the learning rate"):
        train(config, tmp_path / "run")


def test_a_run_gives_up_after_its_rollbacks(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, calls=set(range(4, 100)))
    guard = GuardConfig(max_rollbacks=2)
    phases = tuple(dataclasses.replace(phase, guard=guard) for phase in config.phases)
    with pytest.raises(TrainingError, match="after 2 rollbacks"):
        train(dataclasses.replace(config, phases=phases), tmp_path / "run")
