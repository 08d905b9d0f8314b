"""Small untrained models of the family."""

import dataclasses

import torch

from nsp.families.inl_diffusion.config import SIZES, InlConfig
from nsp.families.inl_diffusion.learn import InlLearner
from nsp.families.inl_diffusion.system import InlSystem

TINY = SIZES["tiny"]


def new_system(config: InlConfig = TINY, seed: int = 0) -> InlSystem:
    """Return a system in which all weights matter."""
    torch.manual_seed(seed)
    return InlLearner().untrained(config).eval()


def with_control(base: InlSystem) -> InlSystem:
    """Return the same model with an untrained control."""
    config = dataclasses.replace(base.config, control_depth=1)
    system = new_system(config)
    system.load_state_dict(base.state_dict(), strict=False)
    system.dit.control.begin(system.dit)
    return system
