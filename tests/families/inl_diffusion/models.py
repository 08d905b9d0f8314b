"""Small models of the family `inl_diffusion`, of random weights that all matter."""

import dataclasses

import torch

from nsp.data.sources import ImageSource, Sample
from nsp.families.inl_diffusion.config import SIZES, TextKind
from nsp.families.inl_diffusion.learn import InlLearner
from nsp.families.inl_diffusion.model import open_gates
from nsp.families.inl_diffusion.system import InlSystem
from nsp.text.parts import TextEncoderSettings

CAPTIONS = ("red apple", "green apple on a table", "smiling cat with heart-eyes")
SOURCE = ImageSource(tuple(Sample(name=c, captions=(c,), class_id=None) for c in CAPTIONS), (), ())


def new_tiny_system(text: TextKind = "clip") -> InlSystem:
    """Return a system of the size "tiny" whose prompts are read by an encoder of this kind."""
    config = dataclasses.replace(SIZES["tiny"], text=text)
    torch.manual_seed(0)
    encoder = TextEncoderSettings(vocab_size=560, depth=1, num_heads=2)
    system = InlLearner().new_system(config, encoder, SOURCE)
    open_gates(system.dit)
    return system.eval()
