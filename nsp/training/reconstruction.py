"""The shared part of phases that train on pictures as they are, in every family.

Axes: B pictures, H and W pixels. Values in [-1, 1].
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from nsp.data.dataset import to_model_range
from nsp.data.preview import preview
from nsp.family.objective import Objective, TrainingData

_SHOWN = 16
_BATCH = 64  # pictures reconstructed at once


class PicturesObjective(Objective):
    """Trains on the pictures as they are."""

    def __init__(self, data: TrainingData) -> None:
        super().__init__()
        self.data = data

    def dataset(self) -> Dataset[Mapping[str, object]]:
        """Return the pictures."""
        return self.data.pictures

    def held_out(self) -> Dataset[Mapping[str, object]] | None:
        """Return the held-out pictures."""
        return self.data.held_out


class ReconstructionObjective(PicturesObjective):
    """Learns to reproduce pictures, and shows some next to their reconstructions."""

    rebuilds = True
    keeps_latents = False

    @abstractmethod
    def rebuilt(self, image: Tensor) -> Tensor:
        """Return the reconstructions of pictures (B, 3, H, W), in the same shape, not clamped."""

    @torch.no_grad()
    def samples(self, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Return pictures next to their reconstructions."""
        items = preview(self.data.pictures, _SHOWN, seed=seed)
        device = next(self.trained.parameters()).device
        image = torch.stack([item["image"] for item in items]).to(device)
        rebuilt = self.rebuilt(to_model_range(image))
        rebuilt = ((rebuilt.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        pairs = torch.stack([image, rebuilt], 1).flatten(0, 1).movedim(1, -1)
        titles = [t for item in items for t in (item["caption"], "reconstruction")]
        return pairs.cpu().numpy(), titles


@torch.no_grad()
def reconstructed(
    module: nn.Module, rebuilt: Callable[[Tensor], Tensor], pictures_BHW3: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Return pictures (B, H, W, 3) as the tokenizer `module` keeps them, by its `rebuilt`."""
    device, rows = next(module.parameters()).device, []
    pictures_B3HW = torch.from_numpy(pictures_BHW3).movedim(-1, 1)
    for batch in torch.split(pictures_B3HW, _BATCH):
        image = rebuilt(to_model_range(batch.to(device))).clamp(-1, 1)
        rows.append(((image + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(rows).movedim(1, -1).numpy()


def image_gradient_loss(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean absolute difference of horizontal and vertical finite differences."""
    horizontal = F.l1_loss(a.diff(dim=-1), b.diff(dim=-1))
    return horizontal + F.l1_loss(a.diff(dim=-2), b.diff(dim=-2))


def psnr_db(rebuilt: Tensor, image: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio over all pictures, the reconstructions clamped."""
    mse = F.mse_loss(rebuilt.detach().clamp(-1, 1), image)
    return 10 * torch.log10(4 / mse)
