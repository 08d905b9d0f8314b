"""Exports stages to ONNX; the stage's declaration gives all names, dtypes and free axes."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor, nn

from nsp.errors import ExportError
from nsp.export.graph.in_place_operator import translations
from nsp.stage.io import Axes, Sizes, StageIO, sample_arrays

MODEL_NAME = "model.onnx"
WEIGHTS_NAME = "model.onnx.data"
# Smaller weights are in the model file; larger ones are in a file next to it, which a runtime
# maps into memory.
_INLINE_BYTES = 1 << 20


class _Positional(nn.Module):
    """A stage with one star argument, so that its dynamic axes are one tuple."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *tensors: Tensor) -> Any:
        """Return the stage's outputs."""
        return self.stage(*tensors)


def export_stage(
    stage: nn.Module,
    io: StageIO,
    folder: Path,
    *,
    name: str,
    opset: int,
    trace_sizes: Sizes,
    metadata: Mapping[str, str],
) -> Path:
    """Write `stage` as ONNX to `folder` and return the model's path.

    The same model gives the same bytes. The graph is called `name`, its free axes have their
    declared names, and `metadata` describes its origin.

    `trace_sizes` gives every free axis a different size of at least 2. Raises ExportError when the
    exporter fails.
    """
    arguments = tuple(_tensors(io, trace_sizes))
    free = set(io.free_axes)
    axes = tuple(
        {i: word for i, word in enumerate(spec.words) if word in free}
        for spec in io.inputs.values()
    )
    try:
        with quiet("torch.onnx", "onnxscript", "onnx_ir"):
            program = torch.onnx.export(
                _Positional(stage).eval(),
                arguments,
                dynamo=True,
                opset_version=opset,
                input_names=list(io.inputs),
                output_names=list(io.outputs),
                dynamic_shapes=(axes,),
                custom_translation_table=translations(),
                verbose=False,
            )
    except Exception as error:  # torch.export and the exporter share no base class
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"{name}: torch.onnx.export failed ({type(error).__name__}: {reason})"
        ) from error
    assert program is not None
    graph = program.model.graph
    graph.name = name
    _name_axes(graph.inputs, io.inputs)
    _name_axes(graph.outputs, io.outputs)
    return save(program.model, folder, metadata)


def _name_axes(values: Sequence[onnx_ir.Value], declared: Mapping[str, Axes]) -> None:
    """Name free axes as declared; an axis that became a constant stays, for the lint to find."""
    for value, spec in zip(values, declared.values(), strict=True):
        if value.shape is not None and len(value.shape) == len(spec.words):
            value.shape = onnx_ir.Shape(
                [
                    dim if isinstance(dim, int) or word.isdigit() else word
                    for dim, word in zip(value.shape, spec.words, strict=True)
                ]
            )


def _tensors(io: StageIO, sizes: Sizes) -> Iterator[Tensor]:
    """Yield inputs for tracing, in the declared dtypes."""
    for spec, array in zip(io.inputs.values(), sample_arrays(io, sizes).values(), strict=True):
        yield torch.from_numpy(np.asarray(array)).to(getattr(torch, spec.dtype))


def save(model: onnx_ir.Model, folder: Path, metadata: Mapping[str, str]) -> Path:
    """Write a model with `metadata`, without the exporter's notes, whose paths differ between runs.

    Returns its path.
    """
    _strip(model)
    model.metadata_props.update(sorted(metadata.items()))
    path = folder / MODEL_NAME
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    external = WEIGHTS_NAME if weights > _INLINE_BYTES else None
    onnx_ir.save(model, path, external_data=external)
    return path


def _strip(model: onnx_ir.Model) -> None:
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Hide a library's messages about missing operators and axes with the same name."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
