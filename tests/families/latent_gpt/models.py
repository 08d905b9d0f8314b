"""Small models of the family `latent_gpt` for tests."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from nsp.artifacts.systems import save_checkpoint
from nsp.data.sources import ImageSource, Sample
from nsp.families.latent_gpt.config import SIZES, LatentGptConfig
from nsp.families.latent_gpt.learn import LatentGptLearner
from nsp.families.latent_gpt.system import LatentGptSystem
from nsp.text.parts import TextEncoderSettings
from tests.models import CAPTIONS

TINY = SIZES["tiny"]
UNCONDITIONAL = dataclasses.replace(TINY, text=None)


def new_system(config: LatentGptConfig = TINY, *, seed: int = 0) -> LatentGptSystem:
    """Return a model with random weights of which each matters."""
    torch.manual_seed(seed)
    samples = tuple(Sample(name=c, captions=(c,), class_id=None) for c in CAPTIONS)
    text_encoder = TextEncoderSettings(vocab_size=560, depth=1, num_heads=2)
    source = ImageSource(samples, (), ())
    system = LatentGptLearner().new_system(config, text_encoder, source).eval()
    for parameter in system.gpt.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.normal_(system.vq.quantize.embedding.weight)
    return system


def new_checkpoint(folder: Path, config: LatentGptConfig = TINY) -> Path:
    """Write such a model to `folder` and return it."""
    save_checkpoint(folder, new_system(config), notes={"made_by": "tests"})
    return folder
