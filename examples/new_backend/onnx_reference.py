"""A backend in another package: ONNX's own evaluator in NumPy, slow and easy to step through.

pip install --no-deps ./examples/new_backend && nsp generate --backend onnx-reference --prompt cat
It runs the engines of `nsp export --target onnxruntime --fp32`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.backends.available import Availability, BackendRecord
from nsp.stage.arena import HostArrays
from nsp.stage.backend import Backend
from nsp.stage.io import StageIO


class OnnxReference(HostArrays, Backend):
    """Stages as onnx.reference.ReferenceEvaluator; arrays are NumPy's."""

    name = "onnx_reference"

    def __init__(
        self, files: Mapping[str, Path], stages_io: Mapping[str, StageIO], *, kv_layout: str
    ) -> None:
        super().__init__(stages_io)
        from onnx.reference import ReferenceEvaluator

        self.kv_layout = kv_layout  # how keys and values pass from step to step
        self._stages = {stage: ReferenceEvaluator(str(file)) for stage, file in files.items()}

    def run(
        self,
        stage: str,
        feeds: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return all outputs of a stage; those in `outputs` are written into the arrays there."""
        self.stages_io[stage].check(feeds, stage)  # a wrong shape is named here, not deep inside
        evaluator = self._stages[stage]
        made = dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))
        for name, array in (outputs or {}).items():
            array[...] = made[name]
            made[name] = array
        return made

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array itself: this backend computes where it lies."""
        return array

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a copy that later steps do not overwrite."""
        return np.array(array)


def load(files, stages_io, *, kv_layout, device, num_threads=None):
    """Return the backend of an engine folder's stages."""
    return OnnxReference(files, stages_io, kv_layout=kv_layout)


def probe(record: BackendRecord) -> Availability:
    """Return whether it works on this machine."""
    return Availability(works=True, reason=f"onnx {record.version()} on a CPU", device="cpu")


RECORD = BackendRecord(
    name="onnx_reference",
    runs="engines",
    module="onnx",
    distributions=("onnx",),
    needs="the package onnx",
    probe=probe,
    loader="onnx_reference:load",
    precisions={"cpu": ("fp32",)},
    engines_of="onnxruntime",
)
