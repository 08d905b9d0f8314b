"""torch-fidelity's Inception: the numbers its own code gives for the same random weights."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nsp.errors import CheckpointError, DataError
from nsp.evaluation.features import load_features
from nsp.evaluation.inception import TorchInception

CPU = torch.device("cpu")
A = "branch1x1 64 1 1|branch5x5_1 48 1 1|branch5x5_2 64 5 5 48|branch3x3dbl_1 64 1 1"
A += "|branch3x3dbl_2 96 3 3 64|branch3x3dbl_3 96 3 3 96|branch_pool {pool} 1 1"
B = "branch3x3 384 3 3|branch3x3dbl_1 64 1 1|branch3x3dbl_2 96 3 3 64|branch3x3dbl_3 96 3 3 96"
C = "branch1x1 192 1 1|branch7x7_1 {c} 1 1|branch7x7_2 {c} 1 7 {c}|branch7x7_3 192 7 1 {c}"
C += "|branch7x7dbl_1 {c} 1 1|branch7x7dbl_2 {c} 7 1 {c}|branch7x7dbl_3 {c} 1 7 {c}"
C += "|branch7x7dbl_4 {c} 7 1 {c}|branch7x7dbl_5 192 1 7 {c}|branch_pool 192 1 1"
D = "branch3x3_1 192 1 1|branch3x3_2 320 3 3 192|branch7x7x3_1 192 1 1|branch7x7x3_2 192 1 7 192"
D += "|branch7x7x3_3 192 7 1 192|branch7x7x3_4 192 3 3 192"
E = "branch1x1 320 1 1|branch3x3_1 384 1 1|branch3x3_2a 384 1 3 384|branch3x3_2b 384 3 1 384"
E += "|branch3x3dbl_1 448 1 1|branch3x3dbl_2 384 3 3 448|branch3x3dbl_3a 384 1 3 384"
E += "|branch3x3dbl_3b 384 3 1 384|branch_pool 192 1 1"
STEM = "Conv2d_1a_3x3 32 3 3 3|Conv2d_2a_3x3 32 3 3 32|Conv2d_2b_3x3 64 3 3 32"
STEM += "|Conv2d_3b_1x1 80 1 1 64|Conv2d_4a_3x3 192 3 3 80"
BLOCKS = {
    "Mixed_5b": (192, A.format(pool=32)),
    "Mixed_5c": (256, A.format(pool=64)),
    "Mixed_5d": (288, A.format(pool=64)),
    "Mixed_6a": (288, B),
    "Mixed_6b": (768, C.format(c=128)),
    "Mixed_6c": (768, C.format(c=160)),
    "Mixed_6d": (768, C.format(c=160)),
    "Mixed_6e": (768, C.format(c=192)),
    "Mixed_7a": (768, D),
    "Mixed_7b": (1280, E),
    "Mixed_7c": (2048, E),
}


def convolutions() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every convolution and its weight's shape; one without a last number reads the input."""
    for prefix, (width, text) in {"": (0, STEM), **BLOCKS}.items():
        for line in text.split("|"):
            name, *numbers = line.split()
            count, height, across, channels = [*map(int, numbers), width][:4]
            yield ".".join(filter(None, (prefix, name))), (count, channels, height, across)


def random_state(seed: int = 5) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    state: dict[str, Tensor] = {}

    def add(name: str, shape: tuple[int, ...], spread: float, middle: float = 0) -> None:
        drawn = random.normal(size=shape) * spread + middle
        state[name] = torch.from_numpy(drawn.astype(np.float32))

    for name, shape in convolutions():
        add(f"{name}.conv.weight", shape, float(np.sqrt(2 / np.prod(shape[1:]))))
        add(f"{name}.bn.weight", shape[:1], 0.1, 1)
        add(f"{name}.bn.bias", shape[:1], 0.1)
        add(f"{name}.bn.running_mean", shape[:1], 0.1)
        add(f"{name}.bn.running_var", shape[:1], 0.05, 0.7)
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    add("fc.weight", (1008, 2048), 0.001)
    add("fc.bias", (1008,), 1)
    return state


EXPECTED_FEATURES = [
    [0.2621115446, 0.3220585585, 17.28300858, 15.86761475],
    [0.4400380254, 0.305914253, 17.69055557, 18.66030502],
]
EXPECTED_PROBABILITIES = [
    [4.88234991e-06, 1.83994121e-06, 1.98597852e-13, 1.347974953e-09],
    [4.76837886e-06, 1.55771431e-06, 1.14037902e-13, 9.003797152e-10],
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(random_state(), path)
    return path


def test_the_features_are_those_of_torch_fidelitys_code(weights: Path) -> None:
    """The expected numbers were printed once by its code (commit 028118e) for the same weights."""
    found = load_features(weights, CPU)
    assert isinstance(found, TorchInception)
    assert not found.is_comparable
    random = np.random.default_rng(6)
    pictures = torch.from_numpy(random.integers(0, 256, (2, 64, 48, 3), dtype=np.uint8))
    with torch.inference_mode():
        features, spatial = found.activations(pictures)
        probabilities = found.probabilities(features)
    assert spatial is None
    np.testing.assert_allclose(features[:, ::512], EXPECTED_FEATURES, rtol=2e-5)
    np.testing.assert_allclose(probabilities[:, ::300], EXPECTED_PROBABILITIES, rtol=1e-3)


def test_files_that_do_not_fit_are_refused_in_one_line(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = torch.load(weights, weights_only=True)
    torch.save({n: t for n, t in state.items() if n != "Mixed_6c.branch7x7_2.bn.bias"}, path)
    with pytest.raises(DataError, match=r"has no weight Mixed_6c.branch7x7_2.bn.bias"):
        load_features(path, CPU).activations(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    torch.save({**state, "Mixed_6c.branch7x7_2.conv.weight": torch.zeros(3, 3, 1, 7)}, path)
    with pytest.raises(DataError, match="its weights do not fit together"):
        load_features(path, CPU).activations(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(DataError, match="pt_inception-2015-12-05-6726825d"):
        load_features(path, CPU)
    torch.save({"weights": os.system}, path)
    with pytest.raises(CheckpointError, match="as weights only"):
        load_features(path, CPU)
