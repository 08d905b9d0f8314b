"""What the graph lint promises: each known trap is found in the smallest graph that has it."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nsp.errors import ExportError
from nsp.export.graph.lint import Graph, check_graph, lint
from nsp.export.plan import PlannedBuild
from nsp.stage.backend import TENSORRT_RANKS
from nsp.stage.io import Axes, StageIO

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "float64": TensorProto.DOUBLE,
}


def planned(io: StageIO, *, compiled: bool = True, largest: int = 8) -> PlannedBuild:
    """Return a build of a stage, with one profile in which every free axis goes up to `largest`."""
    sizes = dict.fromkeys(io.free_axes, largest)
    shapes = {n: [list(shape)] * 3 for n, shape in io.input_shapes(sizes).items()}
    return PlannedBuild(
        stage="step",
        target="tensorrt-rtx" if compiled else "onnxruntime",
        backend="tensorrt_rtx" if compiled else "onnxruntime",
        precision="fp16",
        stored_precision="fp16",
        kv_layout="delta",
        opset=18,
        profiles=(shapes,) if compiled else (),
        max_batch=1,
        gpu_archs=(),
        built_for={},
        estimated_bytes=0,
        precision_map={},
        tools={},
        io=io,
        fingerprint="",
        action="build",
        reason="",
    )


def tensor(name: str, spec: Axes):
    axes = [int(word) if word.isdigit() else word for word in spec.words]
    return helper.make_tensor_value_info(name, _TYPES[spec.dtype], axes)


def graph(io: StageIO, nodes, initializers=(), *, opset: int = 18, **replaced: Axes) -> Graph:
    """Return a graph with the declared tensors, those in `replaced` otherwise."""
    inputs = [tensor(n, replaced.get(n, s)) for n, s in io.inputs.items()]
    outputs = [tensor(n, replaced.get(n, s)) for n, s in io.outputs.items()]
    made = helper.make_graph(list(nodes), "g", inputs, outputs, initializer=list(initializers))
    return Graph(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)]))


def node(op: str, inputs: str, outputs: str, **attributes):
    return helper.make_node(op, inputs.split(","), outputs.split(","), name="here", **attributes)


PLAIN = StageIO(inputs={"x": Axes("B L 4")}, outputs={"y": Axes("B L 4")})
RELU = (node("Relu", "x", "y"),)
ATTENTION = StageIO(
    inputs={n: Axes("B 2 L 8", "float16") for n in ("q", "k", "v", "past")},
    outputs={"y": Axes("B 2 L 8", "float16")},
)
RANKS = StageIO(
    inputs={"x": Axes("B 8192"), "ranks": Axes("R", "int64")}, outputs={"y": Axes("B R")}
)


def rules(made: Graph, build: PlannedBuild) -> set[str]:
    return {finding.rule for finding in lint(made, build)}


@pytest.mark.parametrize("compiled", [True, False])
def test_a_sound_graph_passes(compiled):
    assert lint(graph(PLAIN, RELU), planned(PLAIN, compiled=compiled)) == []


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"x": Axes("B 5 4")}, "axis 1 became the constant 5, declared L"),
        ({"y": Axes("B L 3")}, "axis 2 is 3, declared 4"),
        ({"y": Axes("B L 4", "float16")}, "is FLOAT16, declared float32"),
        ({"x": Axes("B 4")}, r"has 2 axes, declared \(B L 4\)"),
    ],
)
def test_tensors_that_are_not_as_declared_are_found(replaced, message, tmp_path):
    made = graph(PLAIN, RELU, **replaced)
    onnx.save(made.model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=rf"step \(tensorrt-rtx fp16\): .*{message}"):
        check_graph(tmp_path / "model.onnx", planned(PLAIN))


def test_a_missing_input_is_found():
    more = StageIO(inputs={**PLAIN.inputs, "z": Axes("B")}, outputs=PLAIN.outputs)
    finding = lint(graph(PLAIN, RELU), planned(more))[0]
    assert (finding.rule, finding.node) == ("declared-tensors", "z")


@pytest.mark.parametrize("op", ["RandomUniformLike", "Multinomial", "Bernoulli"])
def test_random_numbers_inside_a_graph_are_found(op):
    assert rules(graph(PLAIN, [node(op, "x", "y")]), planned(PLAIN)) == {"random"}


def test_operators_of_other_domains_and_opsets_are_found():
    odd = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    assert rules(graph(PLAIN, [odd]), planned(PLAIN)) == {"operators"}
    assert rules(graph(PLAIN, RELU, opset=23), planned(PLAIN)) == {"operators"}


def test_float64_is_found_in_weights_and_casts():
    weight = numpy_helper.from_array(np.ones(4), "w")
    nodes = [node("Cast", "w", "w32", to=TensorProto.FLOAT), node("Add", "x,w32", "y")]
    assert rules(graph(PLAIN, nodes, [weight]), planned(PLAIN)) == {"float64"}
    nodes = [
        node("Cast", "x", "wide", to=TensorProto.DOUBLE),
        node("Cast", "wide", "y", to=TensorProto.FLOAT),
    ]
    assert rules(graph(PLAIN, nodes), planned(PLAIN)) == {"float64"}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_infinite_half_constant_is_found_a_float32_one_is_allowed(dtype):
    io = StageIO(inputs={"x": Axes("B", dtype)}, outputs={"y": Axes("B", dtype)})
    mask = numpy_helper.from_array(np.array([-np.inf], dtype), "mask")
    found = rules(graph(io, [node("Add", "x,mask", "y")], [mask]), planned(io))
    assert found == ({"half-range"} if dtype == "float16" else set())


def test_bfloat16_is_refused_for_onnxruntime_only():
    io = StageIO(inputs={"x": Axes("B", "bfloat16")}, outputs={"y": Axes("B", "bfloat16")})
    made = graph(io, RELU)
    assert rules(made, planned(io, compiled=False)) == {"bfloat16"}
    assert rules(made, planned(io)) == set()


def attention(inputs: str, outputs: str = "y", *, io: StageIO = ATTENTION, **attributes):
    made = graph(io, [node("Attention", inputs, outputs, **attributes)], opset=23)
    return [f.message for f in lint(made, replace(planned(io), opset=23))]


def test_what_tensorrt_makes_of_attention_is_found():
    assert attention("q,k,v") == []
    assert attention("q,k,v", softcap=0.0) == []
    assert attention("q,k,v,,past,past") == ["Attention with past_key", "Attention with past_value"]
    assert attention("q,k,v,,,,past") == ["Attention with nonpad_kv_seqlen"]
    assert attention("q,k,v", "y,present") == ["Attention with several outputs"]
    assert attention("q,k,v", softcap=5.0) == ["Attention with softcap"]
    assert attention("q,q,q") == ["query, key and value are the same tensor"]
    wide = StageIO(
        inputs={n: Axes("B 2 L 8") for n in ("q", "k", "v")}, outputs={"y": Axes("B 2 L 8")}
    )
    assert attention("q,k,v", io=wide) == ["Attention in float32; export at opset 18"]


def test_attention_with_a_cache_is_fine_for_onnxruntime():
    made = graph(ATTENTION, [node("Attention", "q,k,v,,past,past", "y")], opset=23)
    assert lint(made, replace(planned(ATTENTION, compiled=False), opset=23)) == []


def test_a_constant_k_beyond_tensorrts_limit_is_found():
    for k, expected in ((TENSORRT_RANKS, set()), (TENSORRT_RANKS + 1, {"topk"})):
        made = graph(
            RANKS,
            [node("TopK", "x,k", "y,i")],
            [numpy_helper.from_array(np.array([k]), "k")],
        )
        assert rules(made, planned(RANKS)) == expected


def test_a_k_that_is_an_inputs_size_is_held_to_the_largest_profile():
    nodes = [
        node("Shape", "ranks", "size", start=0, end=1),
        node("Squeeze", "size", "scalar"),
        node("Reshape", "scalar,one", "k"),
        node("TopK", "x,k", "y,i"),
    ]
    made = graph(RANKS, nodes, [numpy_helper.from_array(np.array([1]), "one")])
    assert rules(made, planned(RANKS, largest=TENSORRT_RANKS)) == set()
    assert rules(made, planned(RANKS, largest=TENSORRT_RANKS + 1)) == {"topk"}


def test_a_k_nobody_knows_is_found():
    nodes = [node("ReduceSum", "ranks", "k", keepdims=1), node("TopK", "x,k", "y,i")]
    assert rules(graph(RANKS, nodes), planned(RANKS)) == {"topk"}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("Relux", "x", "y")], "No Op registered for Relux"),
        ([node("Relu", "nothing", "y")], "nothing"),
        ([node("Reshape", "x,flat", "y")], "(?i)shape"),
    ],
)
def test_what_onnx_itself_refuses_is_found_and_the_file_stays_as_it_is(nodes, message, tmp_path):
    made = graph(PLAIN, nodes, [numpy_helper.from_array(np.array([2, 6]), "flat")])
    path = tmp_path / "model.onnx"
    onnx.save(made.model, path)
    before = path.read_bytes()
    with pytest.raises(ExportError, match=rf"{message}.*\[checker\]") as caught:
        check_graph(path, planned(PLAIN))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_weights_that_are_missing_are_found(tmp_path):
    weight = numpy_helper.from_array(np.ones((1, 1, 4), np.float32), "w")
    made = graph(PLAIN, [node("Add", "x,w", "y")], [weight])
    path = tmp_path / "model.onnx"
    onnx.save(made.model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    check_graph(path, planned(PLAIN))
    (tmp_path / "w.data").unlink()
    with pytest.raises(ExportError, match=r"w\.data.*\[checker\]"):
        check_graph(path, planned(PLAIN))


def test_antialiased_resizing_is_found():
    resize = node("Resize", "x,,s", "y", mode="linear", antialias=1)
    scales = numpy_helper.from_array(np.ones(3, np.float32), "s")
    assert rules(graph(PLAIN, [resize], [scales]), planned(PLAIN)) == {"resize"}
