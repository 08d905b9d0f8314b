"""Pictures generated while training, through the same loop and stages that are deployed."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nsp.data.dataset import ImageDataset
from nsp.data.preview import preview
from nsp.data.stream import ShardStream
from nsp.family.objective import TrainingData
from nsp.family.registry import family
from nsp.family.system import System
from nsp.pipeline.pipeline import torch_pipeline
from nsp.training.reconstruction import PicturesObjective

_SHOWN = 24


@torch.no_grad()
def generated(
    system: System, data: ImageDataset | ShardStream, seed: int, **settings: Any
) -> tuple[NDArray[np.uint8], list[str]]:
    """Return pictures (N, H, W, 3) for captions or classes of the data, and a title for each.

    `seed` picks these from the data. A model without condition makes one picture for every seed
    from there on.
    """
    system.settle()
    owner = family(system.family)
    items = preview(data, _SHOWN, seed=seed)
    titles = [item["caption"] for item in items]
    asked: dict[str, Any] = {"seed": seed}
    match owner.condition(system.config):
        case "prompt":
            asked["prompts"] = titles
        case "class":
            # Without classes all pictures belong to the one class of an unconditional model.
            asked["class_ids"] = [max(item["class_id"], 0) for item in items]
        case "none":
            asked["seed"] = [seed + number for number in range(_SHOWN)]
            titles = [f"seed {each}" for each in asked["seed"]]
    pipeline = torch_pipeline(owner, system, device=str(next(system.parameters()).device))
    return pipeline.generate(**asked, **settings).images, titles


class GeneratorObjective(PicturesObjective):
    """Teaches a model to draw pictures from the pictures themselves, and shows some of its own."""

    def __init__(self, system: System, trained: nn.Module, data: TrainingData) -> None:
        super().__init__(data)
        self.system, self.trained = system, trained

    def samples(self, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Return pictures that the model draws now."""
        return generated(self.system, self.data.pictures, seed)
