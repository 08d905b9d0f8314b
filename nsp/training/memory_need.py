"""The memory that training needs, from one step on tensors without content.

Weights, gradients, AdamW's two moments and the moving average follow from the weights that learn.
Activations are what a forward and a backward pass keep alive at their widest moment, beside the
gradients; dropout's masks are not counted. All is float32: what mixed precision saves is not
counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nsp.artifacts.counting import Watch
from nsp.family.contract import Kind
from nsp.family.objective import Objective
from nsp.training.data_order import Share, sample_keys

_MOMENTS = 2  # of AdamW


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device, without the pictures that wait for their turn."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


def training_memory(
    objective: Objective,
    *,
    batch: Mapping[str, Any],
    is_averaged: bool,
    mode: FakeTensorMode,
) -> TrainingMemory:
    """Return what a micro-batch like `batch` takes.

    The modules of `objective` were made in `mode`, without content.
    """
    learning = [each for each in objective.trained.parameters() if each.requires_grad]
    weights = {id(each): each for each in (*objective.parameters(), *objective.buffers())}
    watch = Watch(weights)
    objective.eval()
    with mode, watch:
        objective(batch)["loss"].backward()
    gradients = sum(_num_bytes(each) for each in learning)
    for each in learning:
        each.grad = None
    return TrainingMemory(
        weights=sum(_num_bytes(each) for each in weights.values()),
        gradients=gradients,
        optimizer=_MOMENTS * gradients,
        average=gradients if is_averaged else 0,
        activations=max(0, watch.peak_bytes() - gradients),
    )


def blank_batch(kind: Kind, image_size_px: int, batch_size: int) -> dict[str, Any]:
    """Return a micro-batch of white pictures with empty captions, or of the first class.

    It has the form of a stream's, for which objectives make tokens or latents as they go.
    """
    shape = (batch_size, 3, image_size_px, image_size_px)
    class_ids = torch.zeros(batch_size, dtype=torch.int64)
    return {
        "image": torch.full(shape, 255, dtype=torch.uint8),
        "caption": [""] * batch_size,
        "class_id": class_ids,
        "index": torch.arange(batch_size),
        "key": sample_keys(Share(batch_size=batch_size), 0, 0, seed=0),
        # Objectives look for a class in the data, which tensors without content do not show.
        **({"condition": class_ids} if kind == "class" else {}),
    }


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
