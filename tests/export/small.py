"""Builds models smaller than the tiny size: tracing time goes with the number of operators."""

import dataclasses
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
from nsp.families.var.config import SIZES, ClassCondition, VarConfig, with_condition
from nsp.families.var.learn import new_system
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
    text_encoder = {"vocab_size": 560, "depth": 1, "num_heads": 2}
    config = small_config()
    if num_classes:
        config = with_condition(config, ClassCondition(num_classes=num_classes))
    system = new_system(config, text_encoder, ImageSource(samples, (), ()))
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


def compile_for_rtx(folder: Path, **settings: Any) -> None:
    """Compile the model of `write_model` to engine.plan with TensorRT-RTX, without a GPU."""
    compile_engine(
        module="tensorrt_rtx",
        model=write_model(folder),
        plan=folder / "engine.plan",
        profiles=[{"x": [[1, 4], [2, 4], [2, 4]]}],
        gpu_archs=["80"],
        on_progress=lambda done, phase: None,
        **settings,
    )
