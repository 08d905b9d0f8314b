"""What a family gives the trainer: one objective per phase."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset


@dataclass(frozen=True)
class TokenCache:
    """The file that keeps what the tokenizer makes of the pictures."""

    file: Path
    is_given: bool = False  # by the user: it must fit, and is never written


class Objective(nn.Module, ABC):
    """A loss over one batch, and all the trainer must know about the modules behind it.

    `trained` holds the modules that learn; frozen ones may hang beside it. The trainer never looks
    further in. A batch is a cut of one optimizer step's: what `forward` computes must be a mean
    over samples, and what is random about a sample must be drawn from its `key` (see
    `order.sample_uniforms`), so that the result does not depend on the number of devices.
    """

    trained: nn.Module
    needs_captions: bool = False  # what it trains is taught by the captions of the pictures
    work: float = 1.0  # of a training step, as a share of a full one's: for the throughput

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what learns; frozen modules stay in evaluation mode."""
        super().train(False)
        self.training = mode
        self.trained.train(mode)
        return self

    @abstractmethod
    def dataset(self) -> Dataset[Mapping[str, Any]]:
        """Return the training set; an item is a dictionary of tensors, numbers and strings.

        It is asked for once, before modules are sharded or compiled.
        """

    def held_out(self) -> Dataset[Mapping[str, Any]] | None:
        """Return pictures that are never trained on, as `dataset` does, if there are any."""
        return None

    def units(self) -> Sequence[nn.Module]:
        """Return the repeated parts of the model, to be sharded, compiled, recomputed one by one.

        They must be called as modules. None by default.
        """
        return ()

    @abstractmethod
    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return `loss` (scalar, differentiable) and further scalars to report.

        `batch` is a collated one of `dataset`, with `key` (B,) int64 on the CPU.
        """

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies to the parameter `name` of `trained`: to matrices."""
        return parameter.ndim > 1

    @abstractmethod
    def samples(self, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Return pictures (N, H, W, 3) that show the state of training, and a title for each."""

    def before_step(self, step: int, steps: int) -> bool:
        """Prepare for optimizer step `step` of a phase of `steps`.

        Return whether the step's loss compares with those of other such steps: the guard looks for
        spikes among these only.
        """
        return True

    def after_step(self, step: int) -> dict[str, float | Tensor]:
        """Do what belongs between optimizer steps; return further numbers to report.

        Every process calls it: weights changed here must change alike on all of them.
        """
        return {}
