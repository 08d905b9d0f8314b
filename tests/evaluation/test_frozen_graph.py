"""Each operation of a frozen graph equals its definition, written out in NumPy."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nsp.errors import DataError
from nsp.evaluation.frozen_graph import FrozenGraph
from nsp.evaluation.graph_def import read_graph
from tests.evaluation.graph_file import (
    Value,
    attribute,
    constant,
    constants,
    field,
    graph,
    node,
    small_inception,
    tensor,
    varint,
)

Array = NDArray[np.float32]
RANDOM = np.random.default_rng(0)


def saved(folder: Path, content: bytes) -> Path:
    path = folder / "graph.pb"
    path.write_bytes(content)
    return path


def opened(folder: Path, nodes: Sequence[bytes], result: str = "out") -> FrozenGraph:
    path = saved(folder, graph([node("in", "Placeholder"), *nodes]))
    cpu = torch.device("cpu")
    return FrozenGraph(read_graph(path), [result], placeholder="in", device=cpu, source="graph.pb")


def result(folder: Path, nodes: Sequence[bytes], value: Array) -> Array:
    (found,) = opened(folder, nodes).run(torch.from_numpy(value))
    return found.numpy()


def picture(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


def windows(
    image: Array, side: tuple[int, int], stride: int, padding: str
) -> list[list[list[Array]]]:
    """The pixels of every window that are inside the picture, by TensorFlow's rule for SAME."""
    rows = []
    height, width = image.shape[1:3]
    starts = []
    for size, length in ((height, side[0]), (width, side[1])):
        if padding == "VALID":
            starts.append([stride * n for n in range((size - length) // stride + 1)])
            continue
        count = -(-size // stride)
        total = max((count - 1) * stride + length - size, 0)
        starts.append([stride * n - total // 2 for n in range(count)])
    for top in starts[0]:
        rows.append([])
        for left in starts[1]:
            down = slice(max(top, 0), min(top + side[0], height))
            across = slice(max(left, 0), min(left + side[1], width))
            rows[-1].append(
                [image[:, down, across], np.array([down.start - top, across.start - left])]
            )
    return rows


def conv_by_hand(image: Array, weight: Array, stride: int, padding: str) -> Array:
    rows = []
    for row in windows(image, weight.shape[:2], stride, padding):
        rows.append([])
        for seen, (top, left) in row:
            part = weight[top : top + seen.shape[1], left : left + seen.shape[2]]
            rows[-1].append(np.einsum("nhwi,hwio->no", seen, part))
    return np.array(rows).transpose(2, 0, 1, 3)


def pool_by_hand(
    reduce: Callable[..., Array], image: Array, side: tuple[int, int], stride: int, padding: str
) -> Array:
    rows = windows(image, side, stride, padding)
    pooled = [[reduce(seen, axis=(1, 2)) for seen, _ in row] for row in rows]
    return np.array(pooled).transpose(2, 0, 1, 3)


CASES = list(itertools.product(((1, 1), (3, 3), (1, 7), (2, 3)), (1, 2, 3), ("SAME", "VALID")))


@pytest.mark.parametrize(("side", "stride", "padding"), CASES)
@pytest.mark.parametrize("size", [(8, 9), (7, 11)])
def test_convolutions_and_pools_are_tensorflows(
    tmp_path: Path, side: tuple[int, int], stride: int, padding: str, size: tuple[int, int]
) -> None:
    image, weight = picture(2, *size, 3), picture(*side, 3, 5)
    place: dict[str, Value] = {"strides": [1, stride, stride, 1], "padding": padding}
    conv = [constant("w", weight), node("out", "Conv2D", ["in", "w"], **place)]
    np.testing.assert_allclose(
        result(tmp_path, conv, image), conv_by_hand(image, weight, stride, padding), atol=1e-5
    )
    place["ksize"] = [1, *side, 1]
    for op, reduce in (("MaxPool", np.max), ("AvgPool", np.mean)):
        np.testing.assert_allclose(
            result(tmp_path, [node("out", op, ["in"], **place)], image),
            pool_by_hand(reduce, image, side, stride, padding),
            atol=1e-6,
        )


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_resizing_takes_pixel_i_from_i_times_the_ratio_of_sizes(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, high: int, wide: int
) -> None:
    image = picture(1, height, width, 2)
    nodes = [
        constant("size", np.array([high, wide], np.int32)),
        node("out", "ResizeBilinear", ["in", "size"], align_corners=False),
    ]
    expected = np.zeros((1, high, wide, 2), np.float32)
    for y, x in itertools.product(range(high), range(wide)):
        down, across = (
            np.float32(y) * np.float32(height / high),
            np.float32(x) * np.float32(width / wide),
        )
        top, left = int(down), int(across)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        upper, lower = (
            image[:, row, left] + (image[:, row, right] - image[:, row, left]) * (across - left)
            for row in (top, bottom)
        )
        expected[:, y, x] = upper + (lower - upper) * (down - top)
    found = result(tmp_path_factory.mktemp("resize"), nodes, image)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_normalisation_uses_gamma_only_where_the_node_says_so(tmp_path: Path, scaled: bool) -> None:
    image = picture(2, 3, 3, 4)
    mean, beta, gamma = (picture(4) for _ in range(3))
    variance = picture(4) ** 2
    nodes = constants({"m": mean, "v": variance, "b": beta, "g": gamma})
    settings = {"variance_epsilon": 0.5, "scale_after_normalization": scaled}
    op = "BatchNormWithGlobalNormalization"
    nodes.append(node("out", op, ["in", "m", "v", "b", "g"], **settings))
    expected = (image - mean) / np.sqrt(variance + 0.5) * (gamma if scaled else 1) + beta
    np.testing.assert_allclose(result(tmp_path, nodes, image), expected, atol=1e-5)


def test_the_other_operations(tmp_path: Path) -> None:
    image = picture(2, 3, 3, 4)
    two = constant("c", np.array(2, np.float32))
    axis = constant("axis", np.array(3, np.int32))
    for nodes, expected in (
        ([two, node("out", "Sub", ["in", "c"])], image - 2),
        ([two, node("out", "Mul", ["in:0", "c"])], image * 2),
        ([node("out", "Relu", ["in"])], image.clip(min=0)),
        ([axis, node("out", "Concat", ["axis", "in", "in"])], np.tile(image, 2)),
        ([axis, node("out", "ConcatV2", ["in", "in", "axis"])], np.tile(image, 2)),
        ([two, node("out", "Identity", ["in", "^c"])], image),
        ([node("out", "CheckNumerics", ["in"])], image),
    ):
        np.testing.assert_allclose(result(tmp_path, nodes, image), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
@pytest.mark.parametrize("listed", [False, True])
def test_constants_are_read_in_every_form(tmp_path: Path, dtype: str, listed: bool) -> None:
    array = np.array([[1, -2, 3], [4, 5, -60000]]).astype(dtype)
    nodes = read_graph(saved(tmp_path, graph([constant("c", array, listed=listed)])))
    found = nodes["c"].constant()
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)
    one = tensor(array)[: tensor(array).index(array.tobytes()[:4]) - 2]  # type and shape
    filled = one + field(5, np.float32(7).tobytes()) if dtype == "float32" else None
    if filled:
        content = graph([node("c", "Const", value=field(8, filled))])
        assert np.array_equal(
            read_graph(saved(tmp_path, content))["c"].constant(), np.full((2, 3), 7)
        )


def test_attributes_are_read_in_every_form(tmp_path: Path) -> None:
    given_ = {"a": True, "b": -5, "c": 0.25, "d": "SAME", "e": [1, -2, 300]}
    unpacked = field(1, b"".join(field(3, each) for each in (4, 5)))
    content = graph([node("n", "Op", ["x", "^y"], **given_, f=unpacked, g=field(6, 1))])
    found = read_graph(saved(tmp_path, content))["n"]
    assert found.inputs == ("x", "^y")
    assert found.attributes == {**given_, "d": b"SAME", "e": (1, -2, 300), "f": (4, 5)}


def test_unneeded_nodes_are_neither_known_nor_read(tmp_path: Path) -> None:
    path = saved(tmp_path, small_inception())
    nodes = read_graph(path)
    assert nodes["DecodeJpeg"].op == "DecodeJpeg"
    cpu = torch.device("cpu")
    names = ["pool_3", "mixed_6/conv", "softmax/weights"]
    made = FrozenGraph(nodes, names, placeholder="ExpandDims", device=cpu, source="g")
    pool, spatial, weights = made.run(torch.from_numpy(picture(2, 40, 30, 3)))
    assert (pool.shape, spatial.shape) == ((2, 1, 1, 6), (2, 5, 5, 8))
    assert weights.shape == (6, 5)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("out", "Tanh", ["in"])], "node out is a Tanh, which is not an operation"),
        ([node("out", "Relu", ["none"])], "graph.pb has no node 'none'"),
        ([node("out", "Relu", ["a"]), node("a", "Relu", ["out"])], "in a circle"),
        ([node("out", "Relu")], "node out .Relu. cannot be computed"),
        ([node("out", "MaxPool", ["in"], padding="SAME")], "attribute ksize is not a list"),
        (
            [
                constant("s", np.array([10**6, 10**6], np.int32)),
                node("out", "ResizeBilinear", ["in", "s"]),
            ],
            "too many",
        ),
        (
            [
                constant("w", np.ones((1, 1, 3, 2**21), np.float32)),
                node("out", "Conv2D", ["in", "w"], strides=[1, 1, 1, 1], padding="SAME"),
            ],
            "too many",
        ),
        (
            [
                constant("w", np.ones((1, 1, 2, 4), np.float32)),
                node("out", "Conv2D", ["in", "w"], strides=[1, 1, 1, 1], padding="SAME"),
            ],
            "node out .Conv2D. cannot be computed",
        ),
        ([node("out", "Const", value=attribute(3))], "it has no value"),
        (
            [
                node(
                    "out",
                    "Const",
                    value=field(8, field(1, 1) + field(2, field(2, field(1, 2**40)))),
                )
            ],
            "not known",
        ),
    ],
)
def test_a_graph_that_cannot_run_is_refused_in_one_line(
    tmp_path: Path, nodes: Sequence[bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        opened(tmp_path, nodes).run(torch.zeros(1, 8, 8, 3))


def test_results_that_grow_with_every_node_are_stopped(tmp_path: Path) -> None:
    nodes = [constant("axis", np.array(3, np.int32))]
    names = ["in", *(f"n{number}" for number in range(40)), "out"]
    nodes += [node(b, "Concat", ["axis", a, a]) for a, b in itertools.pairwise(names)]
    with pytest.raises(DataError, match="too large"):
        opened(tmp_path, nodes).run(torch.zeros(1, 8, 8, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!doctype html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS"),
        (b"just words", "not a GraphDef"),
        (varint(1 << 3 | 2) + varint(2**62) + b"x", "not a GraphDef"),
        (b"\x0a" + b"\xff" * 20, "not a GraphDef"),
        (field(2, b"library"), "no operations"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_graph(saved(tmp_path, content))


def test_a_cut_or_changed_graph_never_raises_anything_else(tmp_path: Path) -> None:
    whole = small_inception()
    random = np.random.default_rng(1)
    for trial in range(300):
        content = bytearray(whole)
        if trial % 2:
            content = content[: random.integers(1, len(whole))]
        for place in random.integers(0, len(content), 3):
            content[place] = random.integers(0, 256)
        try:
            nodes = read_graph(saved(tmp_path, bytes(content)))
            cpu = torch.device("cpu")
            names = ["pool_3", "mixed_6/conv"]
            made = FrozenGraph(nodes, names, placeholder="ExpandDims", device=cpu, source="g")
            made.run(torch.zeros(1, 20, 20, 3))
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017
