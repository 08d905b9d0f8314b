"""A frozen graph of the real one's size computes what torch-fidelity's network does.

Both roads to features have the same weights here: the graph is written with the evaluator's
operations, in TensorFlow's layouts, from a state dict of torch-fidelity's names.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nsp.evaluation.features import AdmInception
from nsp.evaluation.inception import TorchInception
from tests.evaluation.graph_file import constant, constants, graph, node
from tests.evaluation.test_inception import BLOCKS, random_state

CPU = torch.device("cpu")
STEM = (  # name, source, stride, padding
    ("Conv2d_1a_3x3", "Mul", 2, "VALID"),
    ("Conv2d_2a_3x3", "Conv2d_1a_3x3", 1, "VALID"),
    ("Conv2d_2b_3x3", "Conv2d_2a_3x3", 1, "SAME"),
    ("Conv2d_3b_1x1", "pool", 1, "VALID"),
    ("Conv2d_4a_3x3", "Conv2d_3b_1x1", 1, "VALID"),
)


def conv(
    state: Mapping[str, Tensor], name: str, source: str, stride: int, padding: str, to: str = ""
) -> Iterator[bytes]:
    """A convolution, its normalisation with gamma, and a ReLU called `to`, or as the layer."""
    parts = {"mean": "running_mean", "variance": "running_var", "beta": "bias", "gamma": "weight"}
    yield from constants({f"{name}/{p}": state[f"{name}.bn.{n}"].numpy() for p, n in parts.items()})
    weight = state[f"{name}.conv.weight"].permute(2, 3, 1, 0).contiguous().numpy()
    yield constant(f"{name}/params", weight)
    place = {"strides": [1, stride, stride, 1], "padding": padding}
    yield node(f"{name}/Conv2D", "Conv2D", [source, f"{name}/params"], **place)
    inputs = [f"{name}/Conv2D", *(f"{name}/{part}" for part in parts)]
    settings = {"variance_epsilon": 0.001, "scale_after_normalization": True}
    yield node(f"{name}/norm", "BatchNormWithGlobalNormalization", inputs, **settings)
    yield node(to or name, "Relu", [f"{name}/norm"])


def pool(name: str, op: str, source: str, side: int, stride: int, padding: str) -> bytes:
    place = {"ksize": [1, side, side, 1], "strides": [1, stride, stride, 1], "padding": padding}
    return node(name, op, [source], **place)


def block(state: Mapping[str, Tensor], name: str, source: str) -> Iterator[bytes]:
    """One block: branches, whose last convolution in a halving block has stride 2, and a pool."""
    halves = name in ("Mixed_6a", "Mixed_7a")
    layers = [line.split()[0] for line in BLOCKS[name][1].split("|")]
    branches: dict[str, dict[str, list[str]]] = {}
    for layer in layers:
        found = re.fullmatch(r"(.+?)(?:_(\d)[ab]?)?", layer)
        assert found is not None
        base, step = found.groups(default="")
        branches.setdefault(base, {}).setdefault(step, []).append(layer)
    ends: list[str] = []
    for base, steps in branches.items():
        last = [source]
        if base == "branch_pool":
            op = "MaxPool" if name == "Mixed_7c" else "AvgPool"
            yield pool(f"{name}/pool", op, source, 3, 1, "SAME")
            last = [f"{name}/pool"]
        for number, (_, made) in enumerate(steps.items(), 1):
            is_last = halves and number == len(steps)
            ready = []
            for layer in made:
                to = "mixed_6/conv" if (name, layer) == ("Mixed_6d", "branch1x1") else ""
                padding = "VALID" if is_last else "SAME"
                yield from conv(state, f"{name}.{layer}", last[0], 1 + is_last, padding, to)
                ready.append(to or f"{name}.{layer}")
            last = ready
        ends += last
    if halves:
        yield pool(f"{name}/pool", "MaxPool", source, 3, 2, "VALID")
        ends.append(f"{name}/pool")
    if halves:
        yield node(name, "ConcatV2", [*ends, "axis"])
    else:
        yield node(name, "Concat", ["axis", *ends])


def whole_graph(state: Mapping[str, Tensor]) -> bytes:
    nodes = [
        node("ExpandDims", "Placeholder"),
        constant("size", np.array([299, 299], np.int32)),
        node("ResizeBilinear", "ResizeBilinear", ["ExpandDims", "size"]),
        constant("Sub/y", np.array(128, np.float32)),
        node("Sub", "Sub", ["ResizeBilinear", "Sub/y"]),
        constant("Mul/y", np.array(1 / 128, np.float32)),
        node("Mul", "Mul", ["Sub", "Mul/y"]),
        constant("axis", np.array(3, np.int32)),
        pool("pool", "MaxPool", "Conv2d_2b_3x3", 3, 2, "VALID"),
        pool("pool_1", "MaxPool", "Conv2d_4a_3x3", 3, 2, "VALID"),
    ]
    for name, source, stride, padding in STEM:
        nodes += conv(state, name, source, stride, padding)
    source = "pool_1"
    for name in BLOCKS:
        nodes += block(state, name, source)
        source = name
    nodes += [
        pool("pool_3", "AvgPool", source, 8, 1, "VALID"),
        constant("softmax/weights", state["fc.weight"].T.contiguous().numpy()),
        node("softmax/logits/MatMul", "MatMul", ["pool_3", "softmax/weights"]),
    ]
    return graph(nodes)


def test_the_graph_and_the_weights_give_the_same_features_and_classes(tmp_path: Path) -> None:
    state = random_state()
    (tmp_path / "graph.pb").write_bytes(whole_graph(state))
    torch.save(state, tmp_path / "weights.pth")
    by_graph = AdmInception(tmp_path / "graph.pb", CPU)
    by_weights = TorchInception(tmp_path / "weights.pth", CPU)
    random = np.random.default_rng(7)
    pictures = torch.from_numpy(random.integers(0, 256, (2, 72, 56, 3), dtype=np.uint8))
    with torch.inference_mode():
        features, spatial = by_graph.activations(pictures)
        expected, _ = by_weights.activations(pictures)
        classes = by_graph.probabilities(features)
        expected_classes = by_weights.probabilities(expected)
    assert (features.shape, spatial.shape) == ((2, 2048), (2, 7 * 17 * 17))
    np.testing.assert_allclose(features, expected, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(classes, expected_classes, rtol=2e-3, atol=1e-7)
