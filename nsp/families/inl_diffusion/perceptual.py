"""The distance of two pictures in the features of VGG16, whose weights the user gives.

Axes: B pictures, H and W pixels in [-1, 1].
Source: Simonyan and Zisserman 2014, arXiv:1409.1556, configuration D, up to the ReLU of its tenth
convolution; names and order of layers are those of torchvision's `vgg16().features[:23]`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.errors import CheckpointError
from nsp.weights.module_weights import load_state
from nsp.weights.state_names import find_state
from nsp.weights.weight_files import read_tensor_file

_WIDTHS = (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512)  # None: pooling
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, of pixels in [0, 1]
_PREFIX = "features."


class VggDistance(nn.Module):
    """The mean squared difference of features; its weights do not learn."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        num_in = 3
        for width in _WIDTHS:
            if width is None:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(num_in, width, 3, padding=1), nn.ReLU()]
            num_in = width
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def _seen(self, image_B3HW: Tensor) -> Tensor:
        found: Tensor = self.features(((image_B3HW + 1) / 2 - self.mean) / self.std)
        return found

    def forward(self, made_B3HW: Tensor, wanted_B3HW: Tensor) -> Tensor:
        """Return the distance, averaged over pictures."""
        with torch.no_grad():
            wanted = self._seen(wanted_B3HW)
        return F.mse_loss(self._seen(made_B3HW).float(), wanted.float())


def read_vgg(path: Path) -> VggDistance:
    """Return the distance with the weights of a file, a state dict of torchvision's VGG16.

    What the file has beyond the layers that are used is ignored. Raises CheckpointError for another
    file.
    """
    state = find_state(read_tensor_file(path), path)
    made = VggDistance()
    names = made.features.state_dict()
    own = {n.removeprefix(_PREFIX): t for n, t in state.items()}
    if not names.keys() & own.keys():
        raise CheckpointError(
            f"{path} has no weights of VGG16 (features.0.weight and others); give a state dict of "
            "torchvision's vgg16"
        )
    load_state(made.features, {n: t for n, t in own.items() if n in names}, str(path))
    return made.eval()
