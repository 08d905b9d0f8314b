"""A graph that filters only where a row asks for it promises the same as one that always does."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from nsp.export.graph.onnx_export import export_stage
from nsp.layers.logits import filter_by_rank
from nsp.raster.drawing import filter_where_asked
from nsp.stage.io import Axes, StageIO

IO = StageIO(
    {
        "x": Axes("B 1 50"),
        "top_p": Axes("B"),
        "top_k": Axes("B", "int64"),
        "ranks": Axes("R", "int64"),
    },
    {"kept": Axes("B 1 50")},
)


class Filter(nn.Module):
    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (filter_where_asked(*inputs),)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filter")
    sizes = {"B": 2, "R": 3}
    return export_stage(
        Filter(), IO, folder, name="filter", opset=23, trace_sizes=sizes, metadata={}
    )


@pytest.mark.parametrize(
    ("top_p", "top_k", "ranks"),
    [((1, 1), (0, 0), 1), ((1, 1), (0, 4), 4), ((0.5, 1), (0, 0), 50), ((1, 0.7), (9, 3), 9)],
)
def test_one_branch_filters_and_the_other_keeps_all(
    graph: Path, top_p: tuple[float, ...], top_k: tuple[int, ...], ranks: int
) -> None:
    assert [node.op_type for node in onnx.load(graph).graph.node].count("If") == 1
    x = np.random.default_rng(0).standard_normal((2, 1, 50)).astype(np.float32)
    feeds = {
        "x": x,
        "top_p": np.array(top_p, np.float32),
        "top_k": np.array(top_k),
        "ranks": np.arange(ranks),
    }
    (found,) = ort.InferenceSession(graph).run(None, feeds)
    expected = filter_by_rank(*(torch.from_numpy(each) for each in feeds.values())).numpy()
    np.testing.assert_array_equal(found, expected)
    assert (found == x).all() == (max(top_k) == 0 and min(top_p) == 1)
