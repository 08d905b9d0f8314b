"""Narrows weights: makes a copy of a model with its declared parts in float16 or bfloat16."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nsp.artifacts.manifest import PRECISION_DTYPES
from nsp.artifacts.weight_kinds import matches
from nsp.family.contract import Stage


def at_precision(system: nn.Module, stages: Mapping[str, Stage], precision: str) -> Any:
    """Return `system` for "fp32", otherwise a copy with its `half` weights in that precision.

    The modules compute in the dtype of their weights, so nothing else changes. For "int8" the model
    does not change: its graphs are quantized (quantize.py).
    """
    if precision in ("fp32", "int8"):
        return system
    dtype = getattr(torch, PRECISION_DTYPES[precision])
    patterns = [pattern for each in stages.values() for pattern in each.half]
    narrowed = copy.deepcopy(system)
    for name, parameter in narrowed.named_parameters():
        if matches(name, patterns):
            parameter.data = parameter.data.to(dtype)
    return narrowed
