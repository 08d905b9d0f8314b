"""Features of pictures from an Inception that the user has as a file; its content says which.

classify_image_graph_def.pb, the ADM evaluator's frozen graph, gives figures that can be compared
with published ones; torch-fidelity's weights give figures for comparing one's own models.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nsp.errors import ConfigError, DataError
from nsp.evaluation.frozen_graph import FrozenGraph
from nsp.evaluation.graph_def import read_graph
from nsp.evaluation.inception import TorchInception
from nsp.sniff import explain, sniff

GRAPH_FILE = "classify_image_graph_def.pb"
TORCH_FILE = "pt_inception-2015-12-05-6726825d.pth"
NO_FILE = (
    f"no figure without an Inception: give the ADM evaluator's {GRAPH_FILE}, or torch-fidelity's "
    f"{TORCH_FILE}, with --inception FILE; docs/evaluate.md says where both are"
)
_SPATIAL_CHANNELS = 7  # of mixed_6/conv; with 17 x 17 pixels they are 2023 features
_WEIGHTS = ("torch", "legacy torch", "pickle", "safetensors")


class Features(Protocol):
    """What the figures need of an Inception. In names of arrays: N pictures, D and S features."""

    name: str  # in words
    is_comparable: bool  # with published figures

    def activations(self, pictures_NHWC: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return features (N, D) and, if it has them, spatial ones (N, S), of uint8 pictures."""

    def probabilities(self, features_ND: Tensor) -> Tensor:
        """Return the probabilities (N, K) of the classes, computed without the bias."""


class AdmInception:
    """The ADM evaluator's graph: pool_3, seven channels of mixed_6/conv, and its classes.

    Source: github.com/openai/guided-diffusion, evaluations/evaluator.py, _create_feature_graph and
    _create_softmax_graph.
    """

    name = "the ADM evaluator's Inception"
    is_comparable = True

    def __init__(self, path: Path, device: torch.device) -> None:
        """Read the graph; DataError in one line for another file."""
        nodes = read_graph(path)
        product = nodes.get("softmax/logits/MatMul")
        if product is None or product.op != "MatMul" or len(product.inputs) < 2:
            raise DataError(
                f"{path} has no product softmax/logits/MatMul; give the ADM evaluator's "
                f"{GRAPH_FILE}"
            )
        results = ("pool_3", "mixed_6/conv")
        self._graph = FrozenGraph(
            nodes, results, placeholder="ExpandDims", device=device, source=str(path)
        )
        weights = FrozenGraph(
            nodes,
            [product.inputs[1].removesuffix(":0")],
            placeholder="ExpandDims",
            device=device,
            source=str(path),
        )
        (self._weight_DK,) = weights.run(torch.zeros(1, 1, 1, 3, device=device))

    def activations(self, pictures_NHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Return pool_3 (N, 2048) and the spatial features (N, 2023) of uint8 pictures."""
        pool, spatial = self._graph.run(pictures_NHWC.float())
        return pool.flatten(1), spatial[..., :_SPATIAL_CHANNELS].flatten(1)

    def probabilities(self, features_ND: Tensor) -> Tensor:
        """Return the probabilities (N, 1008) of the classes."""
        return (features_ND @ self._weight_DK).softmax(dim=1)


def load_features(path: Path | None, device: torch.device) -> Features:
    """Return the Inception in a file; ConfigError without one, one line for every other file."""
    if path is None:
        raise ConfigError(NO_FILE)
    found = sniff(path)
    if found.is_spoilt:
        raise DataError(explain(path, expected=GRAPH_FILE, found=found))
    return (TorchInception if found.kind in _WEIGHTS else AdmInception)(path, device)
