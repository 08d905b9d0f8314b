"""What engines of raster families promise on a real GPU: PyTorch's codes, also as CUDA graphs.

pytest -m gpu -rA tests/raster/test_engines_gpu.py
"""

from pathlib import Path

import pytest

from nsp.backends.available import availability
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from tests.raster.small import (
    FAMILIES,
    agreement,
    assert_graphs_of_rows_replay,
    assert_same_codes,
    small_checkpoint,
)

pytestmark = pytest.mark.gpu

FLAVOURS = ("tensorrt", "tensorrt_rtx")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp(request.param) / "checkpoint", request.param)


@pytest.fixture(scope="module", params=FLAVOURS)
def engine_dir(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Engines in fp32 and fp16, and the backend that they are for."""
    from nsp.export.run import ExportOptions, export

    flavour: str = request.param
    found = availability(flavour)
    if not found.works:
        pytest.skip(f"{flavour}: {found.reason}")
    folder = tmp_path_factory.mktemp(flavour) / "engines"
    export(
        ExportOptions(
            checkpoint=str(checkpoint),
            engine_dir=str(folder),
            precisions=("fp32", "fp16"),
            targets=(flavour.replace("_", "-"),),
            gpu_archs=("current",) if flavour == "tensorrt_rtx" else (),
        )
    )
    return folder, flavour


@pytest.fixture
def reference(checkpoint: Path) -> Pipeline:
    return load_pipeline(checkpoint, "torch", device="cpu")


def test_fp32_engines_draw_the_codes_of_pytorch(
    engine_dir: tuple[Path, str], reference: Pipeline
) -> None:
    assert_same_codes(load_pipeline(*engine_dir, precision="fp32"), reference)


def test_fp16_engines_draw_at_least_99_percent_of_the_codes_teacher_forced(
    engine_dir: tuple[Path, str], reference: Pipeline
) -> None:
    found = load_pipeline(*engine_dir, precision="fp16")
    assert agreement(found, reference, num_seeds=32) >= 0.99


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_for_every_row_of_codes_replays_what_a_plain_run_makes(
    engine_dir: tuple[Path, str], precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert_graphs_of_rows_replay(load_pipeline(*engine_dir, precision=precision))
    assert "not as a CUDA graph" not in caplog.text
