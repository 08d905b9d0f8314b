"""Prompts lose tokens in training, and only there."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.data.dataset import ImageDataset
from nsp.data.sources import ImageSource
from nsp.errors import ConfigError
from nsp.families.var.config import SIZES, with_condition
from nsp.families.var.model import Conditioning
from nsp.families.var.objective import PredictorObjective, PredictorSettings
from nsp.families.var.system import VarSystem
from nsp.family.classes import ClassCondition
from nsp.family.objective import TrainingData


def test_prompts_lose_tokens_in_training_and_are_whole_in_validation(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system: VarSystem = read_checkpoint(tiny_checkpoint).load()
    data = ImageDataset(ImageSource((), (), ()), 32, train=True, crop=False)
    objective = PredictorObjective(system, TrainingData(data), PredictorSettings(token_drop=0.9))
    seen: list[Tensor] = []
    whole = system.condition

    def noting(condition_B: Tensor, dropped_B: Tensor) -> Conditioning:
        seen.append(condition_B)
        return whole(condition_B, dropped_B)

    monkeypatch.setattr(system, "condition", noting)
    prompts = system.encode_prompts(["red apple on a table"] * 8)
    tokens = torch.zeros(8, system.config.num_tokens, dtype=torch.int64)
    batch = {"condition": prompts, "tokens": tokens, "key": torch.arange(8)}
    losses = [objective.train()(batch)["loss"], objective.train()(batch)["loss"]]
    objective.eval()(batch)
    first, again, validated = seen
    assert torch.equal(first, again)  # a function of the samples' keys
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(validated, prompts)
    assert system.prompt_tokenizer is not None
    lengths = (first == system.prompt_tokenizer.eos_id).int().argmax(1)  # other ones each time
    assert lengths.unique().numel() > 1
    assert lengths.max() <= (prompts[0] == system.prompt_tokenizer.eos_id).int().argmax()


def test_a_share_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="token_drop"):
        PredictorSettings(token_drop=1.0)


def test_a_class_has_no_tokens_to_lose() -> None:
    system = VarSystem(with_condition(SIZES["tiny"], ClassCondition(num_classes=2)))
    data = ImageDataset(ImageSource((), (), ()), 16, train=True, crop=False)
    with pytest.raises(ConfigError, match="class-conditional"):
        PredictorObjective(system, TrainingData(data), PredictorSettings(token_drop=0.5))
