"""Builds models smaller than the tiny size: tracing time goes with the number of operators."""

import dataclasses
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import nsp.export.targets
from nsp.artifacts.systems import save_checkpoint
from nsp.data.sources import ImageSource, Sample
from nsp.export.compile.trt_builder import compile_engine
from nsp.families.var.config import SIZES, VarConfig, with_condition
from nsp.families.var.learn import VarLearner
from nsp.family.classes import ClassCondition
from nsp.text.parts import TextEncoderSettings
from tests.models import CAPTIONS

rtx = pytest.mark.skipif(
    not nsp.export.targets.is_installed(nsp.export.targets.TARGETS["tensorrt-rtx"]),
    reason="the tensorrt-rtx extra is not installed",
)


def small_config() -> VarConfig:
    """Return the tiny size with three scales, one block and two resolutions."""
    tiny = SIZES["tiny"]
    return dataclasses.replace(
        tiny,
        patch_nums=(1, 2, 3),
        vae=dataclasses.replace(tiny.vae, channel_multipliers=(1, 2)),
        predictor=dataclasses.replace(tiny.predictor, depth=1),
    )


def new_small_checkpoint(folder: Path, *, seed: int = 0, num_classes: int = 0) -> Path:
    """Write such a model to `folder` and return it; its logits depend on everything.

    It is text-conditional unless `num_classes` is given.
    """
    torch.manual_seed(seed)
    samples = tuple(Sample(name=c, captions=(c,), class_id=None) for c in CAPTIONS)
    text_encoder = TextEncoderSettings(vocab_size=560, depth=1, num_heads=2)
    config = small_config()
    if num_classes:
        config = with_condition(config, ClassCondition(num_classes=num_classes))
    system = VarLearner().new_system(config, text_encoder, ImageSource(samples, (), ()))
    with torch.no_grad():
        system.predictor.head.weight.mul_(100)
        for block in system.predictor.blocks:
            # The published initialisation all but closes the gates of the residual branches.
            gates, others = (
                block.ada_lin[1].weight.view(6, -1, config.predictor.width).split([2, 4])
            )
            gates.mul_(3000)
            others.mul_(10)
    save_checkpoint(folder, system, notes={"made_by": "tests"})
    return folder


def write_model(
    folder: Path, op: str = "Relu", dtype: int = TensorProto.FLOAT, inputs: int = 1
) -> Path:
    """Write y = op(x, x, ...) to `folder` and return the file."""
    nodes = [helper.make_node(op, ["x"] * inputs, ["y"])]
    tensors = [helper.make_tensor_value_info(name, dtype, ["B", 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:])
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


@contextmanager
def polygraphy_for(module: str) -> Iterator[None]:
    """Let Polygraphy be imported anew for `module`, as in the process of a build."""

    def imported() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Polygraphy always makes a timing cache; TensorRT-RTX has the function, and no use for it.
        warnings.filterwarnings("ignore", ".*Timing cache operations", DeprecationWarning)
        patch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", str(int(module == "tensorrt_rtx")))
        for name in imported():
            patch.delitem(sys.modules, name)
        try:
            yield
        finally:
            for name in imported():
                del sys.modules[name]


def compile_for_rtx(folder: Path, **settings: Any) -> None:
    """Compile the model of `write_model` to engine.plan with TensorRT-RTX, without a GPU."""
    arguments: dict[str, Any] = {
        "model": write_model(folder),
        "plan": folder / "engine.plan",
        "profiles": [{"x": [[1, 4], [2, 4], [2, 4]]}],
        "gpu_archs": ["80"],
        "on_progress": lambda done, phase: None,
    }
    with polygraphy_for("tensorrt_rtx"):
        compile_engine(module="tensorrt_rtx", **{**arguments, **settings})
