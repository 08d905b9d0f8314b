"""What the TensorRT backends promise on a real GPU: ONNX Runtime's pictures, also as graphs.

pytest -m gpu -rA tests/backends/test_tensorrt_gpu.py
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsp.backends.available import availability, backend_record
from nsp.backends.nvidia import find_gpu
from nsp.backends.tensorrt.trt_backend import load_tensorrt_rtx
from nsp.errors import NspError
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from nsp.pipeline.results import Trace

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.gpu

FLAVOURS = ("tensorrt", "tensorrt_rtx")
REQUEST: dict[str, Any] = {"class_ids": [3, 7], "guidance_scale": 4.0, "top_k": 14}


def needs(flavour: str) -> None:
    found = availability(flavour)
    if not found.works:
        pytest.skip(f"{flavour}: {found.reason}")


def export_for(checkpoint: Path, folder: Path, flavour: str, arch: str = "current") -> Path:
    from nsp.export.run import ExportOptions, export

    target = flavour.replace("_", "-")
    export(
        ExportOptions(
            checkpoint=str(checkpoint),
            engine_dir=str(folder),
            precisions=("fp32",),
            targets=("onnxruntime", target),
            gpu_archs=(arch,) if flavour == "tensorrt_rtx" else (),
        )
    )
    return folder


def traced(pipe: Pipeline, **request: Any) -> Trace:
    trace = pipe.generate(trace=True, **request).trace
    assert trace is not None
    return trace


def assert_close(found: Trace, expected: Trace) -> None:
    """Hold scale after scale to the reference, the tokens being forced: a flip stays alone."""
    flips = [(a != b).ravel() for a, b in zip(found.tokens, expected.tokens, strict=True)]
    assert np.concatenate(flips).mean() <= 0.02
    for scale, (one, other) in enumerate(zip(found.logits, expected.logits, strict=True)):
        assert np.abs(one - other).max() <= 1e-3 * np.ptp(other), f"scale {scale}"
    assert np.abs(found.image - expected.image).max() <= 2e-3


def check(found: Pipeline, expected: Pipeline) -> None:
    tokens = np.concatenate(traced(expected, **REQUEST).tokens, axis=1)
    for seed in range(3):  # run, captured, replayed
        request = {**REQUEST, "seed": seed, "forced_tokens": tokens}
        assert_close(traced(found, **request), traced(expected, **request))
    images = [found.generate(**REQUEST, seed=5).images for _ in range(3)]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[1], images[2])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_engines_agree_with_onnxruntime_run_captured_and_replayed(
    flavour: str, tiny_class_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    needs(flavour)
    folder = export_for(tiny_class_checkpoint, tmp_path / "engines", flavour)
    found = load_pipeline(folder, flavour)
    check(found, load_pipeline(folder, "onnxruntime", device="cpu"))
    assert "not as a CUDA graph" not in caplog.text


def test_an_rtx_engine_for_sm80_runs_here_or_is_refused_in_one_line(
    tiny_class_checkpoint: Path, tmp_path: Path
) -> None:
    """The question of GPUs that TensorRT for RTX does not list, Hopper among them."""
    needs("tensorrt_rtx")
    gpu = find_gpu()
    assert gpu is not None
    folder = export_for(tiny_class_checkpoint, tmp_path / "engines", "tensorrt_rtx", "80")
    expected = load_pipeline(folder, "onnxruntime", device="cpu")
    version = backend_record("tensorrt_rtx").version()
    files = {path.parts[-3]: path for path in folder.glob("*/tensorrt_rtx-fp32-*/engine.plan")}
    stages_io = expected.family.stages_io(expected.config, kv_layout="delta", dtype="float32")
    plans, refusal = {stage: files[stage] for stage in stages_io}, ""
    try:  # the manifest would refuse it on another architecture: not what is asked here
        backend = load_tensorrt_rtx(plans, stages_io, kv_layout="delta", device="cuda")
    except NspError as error:
        refusal = str(error)
    else:
        check(Pipeline(expected.family, expected.config, backend), expected)
    assert "\n" not in refusal
    logger.warning("RTX %s, SM80 engine on %s: %s", version, gpu.name, refusal or "runs")
