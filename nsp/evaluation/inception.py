"""The Inception of torch-fidelity, from its weight file: for machines without the ADM graph.

The weights were converted from the same TensorFlow graph, but figures of two programs are not
comparable to the last digit, and this one has no sFID.

Source: github.com/toshas/torch-fidelity, torch_fidelity/feature_extractor_inceptionv3.py, and
Szegedy et al. 2015, arXiv:1512.00567. In names of arrays: N pictures, C channels, D features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from nsp.errors import DataError, lacks_memory, one_line
from nsp.evaluation.frozen_graph import resize_bilinear
from nsp.weights.state_names import find_state
from nsp.weights.weight_files import read_tensor_file

NUM_FEATURES, NUM_CLASSES = 2048, 1008
MAX_BYTES = 512 << 20  # of the file; torch-fidelity's has 95.6 MB
_SIDE_PX = 299
_EPS = 0.001

# A branch is the names of its convolutions, one after the other; two names in brackets are two
# convolutions of the same input, whose results are joined.
Branch: TypeAlias = tuple[str | tuple[str, str], ...]

_A: Sequence[Branch] = (
    ("branch1x1",),
    ("branch5x5_1", "branch5x5_2"),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
)
_B: Sequence[Branch] = (
    ("branch3x3",),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
)
_C: Sequence[Branch] = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
)
_D: Sequence[Branch] = (
    ("branch3x3_1", "branch3x3_2"),
    ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"),
)
_E: Sequence[Branch] = (
    ("branch1x1",),
    ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
    ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
)
# Blocks that keep the size, and how each pools: the last one with a maximum, as the graph does.
_KEEPING: Mapping[str, tuple[Sequence[Branch], str]] = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), (_A, "mean")),
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), (_C, "mean")),
    "Mixed_7b": (_E, "mean"),
    "Mixed_7c": (_E, "max"),
}
_HALVING: Mapping[str, Sequence[Branch]] = {"Mixed_6a": _B, "Mixed_7a": _D}
_BLOCKS = (
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d"),
    *("Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


class TorchInception:
    """Features and classes of pictures by torch-fidelity's weights."""

    name = "torch-fidelity's Inception"
    is_comparable = False
    num_features = NUM_FEATURES

    def __init__(self, path: Path, device: torch.device) -> None:
        """Read the weights as tensors only; DataError or CheckpointError for another file."""
        if path.stat().st_size > MAX_BYTES:
            raise DataError(
                f"{path} is larger than {MAX_BYTES >> 20} MiB: not torch-fidelity's file"
            )
        state = find_state(read_tensor_file(path), path)
        self._source = str(path)
        if any(not each.is_floating_point() for n, each in state.items() if "num_batches" not in n):
            raise DataError(f"{path} has weights that are not floating-point numbers")
        self._state = {name: each.float().to(device) for name, each in state.items()}
        shape = tuple(self._weight("fc.weight").shape)
        if shape != (NUM_CLASSES, NUM_FEATURES):
            raise DataError(
                f"{path}: fc.weight is {shape}, not {(NUM_CLASSES, NUM_FEATURES)}; give "
                "pt_inception-2015-12-05-6726825d.pth"
            )

    def activations(self, pictures_NHWC: Tensor) -> tuple[Tensor, None]:
        """Return the features (N, D) of uint8 pictures, and no spatial ones."""
        try:
            return self._features(pictures_NHWC), None
        except RuntimeError as error:
            if lacks_memory(error):
                raise
            raise DataError(
                f"{self._source}: its weights do not fit together ({one_line(str(error))})"
            ) from error

    def probabilities(self, features_ND: Tensor) -> Tensor:
        """Return the probabilities of the classes, without the bias as the ADM evaluator does."""
        return (features_ND @ self._weight("fc.weight").T).softmax(dim=1)

    def _features(self, pictures_NHWC: Tensor) -> Tensor:
        resized = resize_bilinear(pictures_NHWC.float(), _SIDE_PX, _SIDE_PX)
        x = ((resized - 128) / 128).permute(0, 3, 1, 2)
        x = self._conv(x, "Conv2d_1a_3x3", stride=2, padded=False)
        x = self._conv(x, "Conv2d_2a_3x3", padded=False)
        x = F.max_pool2d(self._conv(x, "Conv2d_2b_3x3"), 3, 2)
        x = self._conv(x, "Conv2d_3b_1x1")
        x = F.max_pool2d(self._conv(x, "Conv2d_4a_3x3", padded=False), 3, 2)
        for name in _BLOCKS:
            x = self._halved(x, name) if name in _HALVING else self._kept(x, name)
        return x.mean(dim=(2, 3))

    def _kept(self, x: Tensor, block: str) -> Tensor:
        branches, pool = _KEEPING[block]
        found = []
        for branch in branches:
            y = x
            for names in branch:
                each = (names,) if isinstance(names, str) else names
                y = torch.cat([self._conv(y, f"{block}.{name}") for name in each], dim=1)
            found.append(y)
        if pool == "max":
            pooled = F.max_pool2d(x, 3, 1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
        return torch.cat([*found, self._conv(pooled, f"{block}.branch_pool")], dim=1)

    def _halved(self, x: Tensor, block: str) -> Tensor:
        found = []
        for branch in _HALVING[block]:
            y = x
            for name in branch[:-1]:
                y = self._conv(y, f"{block}.{name}")
            found.append(self._conv(y, f"{block}.{branch[-1]}", stride=2, padded=False))
        return torch.cat([*found, F.max_pool2d(x, 3, 2)], dim=1)

    def _conv(self, x: Tensor, name: str, *, stride: int = 1, padded: bool = True) -> Tensor:
        """Return relu(batch norm(convolution)); padded, a stride of 1 keeps the size."""
        weight = self._weight(f"{name}.conv.weight")
        padding = [side // 2 if padded else 0 for side in weight.shape[2:]]
        y = F.conv2d(x, weight, stride=stride, padding=padding)
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, variance, gain, bias = (self._weight(f"{name}.bn.{part}") for part in parts)
        return F.batch_norm(y, mean, variance, gain, bias, eps=_EPS).relu()

    def _weight(self, name: str) -> Tensor:
        if name not in self._state:
            raise DataError(
                f"{self._source} has no weight {name}; give torch-fidelity's "
                "pt_inception-2015-12-05-6726825d.pth"
            )
        return self._state[name]
