"""Small models of the family `next_scale` for tests."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsp.artifacts.systems import save_checkpoint
from nsp.data.sources import ImageSource, Sample
from nsp.families.next_scale.config import SIZES, NextScaleConfig
from nsp.families.next_scale.learn import NextScaleLearner
from nsp.families.next_scale.system import NextScaleSystem
from nsp.text.parts import TextEncoderSettings
from tests.models import CAPTIONS


def tiny_config(**generator: Any) -> NextScaleConfig:
    """Return the tiny size with other generator settings."""
    tiny = SIZES["tiny"]
    return dataclasses.replace(tiny, generator=dataclasses.replace(tiny.generator, **generator))


def new_tiny_system(
    config: NextScaleConfig | None = None, *, seed: int = 0, trained: bool = True
) -> NextScaleSystem:
    """Return a model with random weights; where `trained`, what starts as zero is random too."""
    torch.manual_seed(seed)
    samples = tuple(Sample(name=c, captions=(c,), class_id=None) for c in CAPTIONS)
    text_encoder = TextEncoderSettings(vocab_size=560, depth=1, num_heads=2)
    model = config or SIZES["tiny"]
    system = NextScaleLearner().new_system(model, text_encoder, ImageSource(samples, (), ())).eval()
    if trained:
        with torch.no_grad():
            for parameter in system.generator.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.2)
    return system


def new_tiny_checkpoint(folder: Path, config: NextScaleConfig | None = None) -> Path:
    """Write such a model to `folder` and return it."""
    save_checkpoint(folder, new_tiny_system(config), notes={"made_by": "tests"})
    return folder
