"""Engines of raster families: built by TensorRT-RTX without a GPU, run by the stand-in for one."""

from pathlib import Path

import pytest

from nsp.benchmarks.random_model import random_system
from nsp.export.run import ExportOptions, export
from nsp.family.registry import family
from nsp.pipeline.pipeline import Pipeline, torch_pipeline
from tests.backends.machine import Machine
from tests.export.small import rtx
from tests.raster.small import (
    FAMILIES,
    agreement,
    assert_graphs_of_rows_replay,
    assert_same_codes,
    small_checkpoint,
    small_system,
)


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.mark.slow
@rtx
def test_tensorrt_rtx_builds_an_engine_of_every_stage_without_a_gpu(
    name: str, tmp_path: Path
) -> None:
    manifest = export(
        ExportOptions(
            checkpoint=str(small_checkpoint(tmp_path / "checkpoint", name, depth=1, grid_side=2)),
            engine_dir=str(tmp_path / "engines"),
            precisions=("fp16",),
            targets=("tensorrt-rtx",),
            max_batch=1,
            gpu_archs=("86",),
        )
    )
    assert manifest.backends() == ("tensorrt_rtx",)
    declared = family(name).stages(manifest.model_config, kv_layout="fixed", dtype="float16")
    assert [*manifest.stages] == [*declared]
    for stage, (variant,) in manifest.stages.items():
        (file,) = variant.files
        assert (tmp_path / "engines" / file).stat().st_size > 1000
        assert len(variant.profiles) == max(1, len(declared[stage].spans))
        assert "ONNX Runtime" in variant.parity["checked"]
    assert manifest.stages["decode"][0].kv_layout == "fixed"


@pytest.fixture
def pipelines(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Pipeline, Pipeline]:
    """The stand-in's engines with a cache padded to spans, and PyTorch with one that grows."""
    system = small_system(name, grid_side=3)
    machine = Machine(system, tmp_path, monkeypatch, name=name, kv_layout="fixed")
    return machine.load(), torch_pipeline(family(name), system, device="cpu")


def test_engines_on_the_stand_in_draw_the_codes_of_pytorch(
    pipelines: tuple[Pipeline, Pipeline],
) -> None:
    found, expected = pipelines
    assert_same_codes(found, expected)
    assert agreement(found, expected, num_seeds=2) == 1


def test_a_graph_for_every_row_of_codes_replays_what_a_plain_run_makes(
    pipelines: tuple[Pipeline, Pipeline],
) -> None:
    assert_graphs_of_rows_replay(pipelines[0])


def test_an_untrained_model_has_the_condition_of_its_size(name: str) -> None:
    record = family(name)
    system = random_system(record, record.sizes["tiny"])
    assert record.condition(system.config) == "prompt"
    assert system.config.image_size_px == record.sizes["tiny"].image_size_px
