"""What a family gives the trainer: one objective per phase."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset


class Objective(nn.Module, ABC):
    """A loss over one batch, and all the trainer must know about the modules behind it.

    `trained` holds the modules that learn; frozen ones may hang beside it. The trainer never looks
    further in.
    """

    trained: nn.Module

    @abstractmethod
    def dataset(self) -> Dataset[Mapping[str, Any]]:
        """Return the training set; an item is a dictionary of tensors, numbers and strings."""

    @abstractmethod
    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return `loss` (scalar, differentiable) and further scalars to report."""

    @abstractmethod
    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies to the parameter `name` of `trained`."""

    @abstractmethod
    def samples(self, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Return pictures (N, H, W, 3) that show the state of training, and a title for each."""

    def after_step(self, step: int) -> dict[str, float]:
        """Do what belongs between optimizer steps; return further numbers to report."""
        return {}
