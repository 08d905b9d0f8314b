"""Dropout acts where the published model has it, and in training only."""

import dataclasses

import torch

from nsp.families.var.config import SIZES
from nsp.families.var.model import NextScaleTransformer, initialize


def logits(model: NextScaleTransformer, seed: int) -> torch.Tensor:
    inputs = torch.Generator().manual_seed(1)
    states = torch.randn(2, 8, 16, generator=inputs)
    pooled = torch.randn(2, 16, generator=inputs)
    teacher = torch.randn(2, 29, 8, generator=inputs)
    torch.manual_seed(seed)
    conditioning = model.condition_on_text(states, pooled, torch.arange(2))
    return model(conditioning, teacher)


def test_dropout_changes_the_logits_in_training_only() -> None:
    config = SIZES["tiny"]
    dropping = dataclasses.replace(config.predictor, dropout=0.3)
    torch.manual_seed(0)
    model = NextScaleTransformer(dataclasses.replace(config, predictor=dropping))
    initialize(model, adaln_gamma=1.0, head=1.0)
    whole = NextScaleTransformer(config)
    whole.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.equal(logits(model.train(), 1), logits(model, 2))
        torch.testing.assert_close(logits(model.eval(), 1), logits(whole.eval(), 2), rtol=0, atol=0)
