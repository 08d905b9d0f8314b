"""The costs that an export counts stay in its manifest."""

from pathlib import Path

from nsp.artifacts.costs import read_costs
from nsp.artifacts.manifest import Manifest, read_manifest
from nsp.export.options import ExportOptions
from nsp.export.run import export


def test_an_export_counts_every_stage_and_weights_are_those_of_its_files(
    half_engines: tuple[Path, Manifest],
) -> None:
    folder, manifest = half_engines
    costs = read_costs(read_manifest(folder))
    assert costs.keys() == manifest.stages.keys()
    for precision in ("fp32", "fp16"):
        files = {
            name
            for variants in manifest.stages.values()
            for variant in variants
            if variant.precision == precision
            for name in variant.files
        }
        measured = sum((folder / name).stat().st_size for name in files)
        counted = sum(each.weight_bytes(precision) for each in costs.values())
        graphs = 2**15 * len(costs)  # of operators, which are most of a model this small
        assert counted < measured < counted + graphs


def test_an_export_with_nothing_to_build_keeps_what_was_counted(
    half_engines: tuple[Path, Manifest], small_checkpoint: Path
) -> None:
    folder, manifest = half_engines
    options = ExportOptions(
        checkpoint=str(small_checkpoint),
        engine_dir=str(folder),
        targets=("onnxruntime",),
        precisions=("fp32", "fp16"),
    )
    assert export(options).costs == manifest.costs
