"""The contract between a family and the trainer: one objective per phase."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Required, Self, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from nsp.data.dataset import ImageDataset
    from nsp.data.stream import ShardStream


@dataclass(frozen=True)
class TokenCache:
    """The file that keeps the tokenizer's output for the pictures."""

    file: Path
    is_given: bool = False  # whether the user gave it: then it must fit, and is never written


@dataclass(frozen=True)
class TrainingData:
    """The pictures of one phase."""

    pictures: "ImageDataset | ShardStream"
    held_out: "ImageDataset | None" = None  # to validate on
    cache: TokenCache | None = None  # keeps what the image tokenizer makes of the pictures
    batch_size: int = 1  # pictures of one optimizer step, over all processes


class Batch(TypedDict, total=False):
    """A collated batch, on the device: `key`, and what the objective's dataset has of the rest."""

    key: Required[Tensor]  # (B,) int64 on the CPU: all randomness of a sample depends on it
    image: Tensor  # (B, 3, H, W) uint8
    caption: list[str]  # "" for a picture without one
    class_id: Tensor  # (B,) int64, -1 for a picture without one
    condition: Tensor  # (B,) class ids, or (B, T) token ids of prompts
    tokens: Tensor  # (B, L) codes of the image tokenizer
    latents: list[Tensor]  # of every scale, (B, C, h, w)
    valid: Tensor  # (B,) 0 for samples that do not count, for example without a caption
    held_out: Tensor  # (B,) bool: not trained on


class Objective(nn.Module, ABC):
    """A loss over one batch, and all that the trainer must know about its modules.

    `trained` has the modules that learn; frozen modules may be next to it. The trainer knows
    nothing else. A batch is a part of one optimizer step's batch, so `forward` must compute a mean
    over samples, and random choices for a sample must be drawn from its `key` (see
    `data_order.sample_uniforms`). Then the result does not depend on the number of devices.
    """

    trained: nn.Module
    rebuilds: bool = False  # whether it trains the image tokenizer, or only the decoder of it
    keeps_latents: bool = True  # whether the tokenizer goes on to encode pictures as it does
    needs_captions: bool = False  # whether training needs the captions of the pictures
    takes_codes: bool = False  # whether it can learn from a folder of codes, without pictures
    work: float = 1.0  # operations of a step as a fraction of a full one's, for the throughput

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the trained modules; frozen modules stay in evaluation mode."""
        super().train(False)
        self.training = mode
        self.trained.train(mode)
        return self

    @abstractmethod
    def dataset(self) -> Dataset[Mapping[str, object]]:
        """Return the training set; an item is a dictionary of tensors, numbers and strings.

        It is called once, before modules are sharded or compiled.
        """

    def held_out(self) -> Dataset[Mapping[str, object]] | None:
        """Return held-out pictures in the form of `dataset`, if there are any."""
        return None

    def units(self) -> Sequence[nn.Module]:
        """Return the repeated parts of the model, to be sharded, compiled or recomputed one by one.

        The model must call them as modules. The default is an empty list.
        """
        return ()

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return `loss` (scalar, differentiable) and further scalars to report.

        `batch` is a collated batch of `dataset`.
        """

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies to the parameter `name` of `trained`: to matrices."""
        return parameter.ndim > 1

    @abstractmethod
    def samples(self, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Return pictures (N, H, W, 3) that show the state of training, and a title for each."""

    def before_step(self, step: int, steps: int) -> bool:
        """Prepare for optimizer step `step` of a phase of `steps`.

        Return whether the step's loss can be compared with those of other steps: the guard looks
        for spikes only among comparable steps.
        """
        return True

    def span(self, step: int, steps: int) -> tuple[int, int]:
        """Return the first step and the length of the part of the phase that has its own rates.

        Learning rate and weight decay follow their schedules over it; by default it is the phase.
        """
        return 0, steps

    def after_step(self, step: int) -> dict[str, float | Tensor]:
        """Do the work between optimizer steps; return further numbers to report.

        Every process calls it, and must change weights in the same way.
        """
        return {}
