"""`nsp plan`: its numbers are those of real exports, images and steps of training."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.counting import Watch
from nsp.artifacts.manifest import Manifest
from nsp.artifacts.systems import save_checkpoint
from nsp.cli import main
from nsp.errors import CheckpointError, ConfigError
from nsp.export.devices import DEVICES
from nsp.export.size_plan import SizePlan, plan_model
from nsp.family import registry
from nsp.family.objective import TrainingData
from nsp.family.registry import family
from nsp.pipeline.dry_run import generate_dry
from nsp.plugins import Plugins
from nsp.training.memory_need import blank_batch
from tests.families.next_scale.models import new_tiny_system

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the other family."""
    folder = tmp_path_factory.mktemp("next") / "checkpoint"
    save_checkpoint(folder, new_tiny_system(), notes={})
    return folder


def near(share: float, number: float) -> Any:
    """Return what is as near to a number as promised."""
    return pytest.approx(number, rel=share)


def assert_as_measured(folder: Path, planned: SizePlan) -> None:
    """Fail unless arena and scratch are those of a real batch, computed by the stages' modules."""
    record = read_checkpoint(folder)
    owner, system = record.family, record.load()
    sampling = owner.sampling.from_dict(record.sampling)
    first = owner.examples(system.config, sampling)[0][0]
    orders = [dataclasses.replace(first, seed=seed) for seed in range(planned.batch)]
    layout = owner.layout(["present"])
    measured = generate_dry(owner, system, orders, kv_layout=layout)
    assert planned.arena == measured.arena_bytes
    assert planned.flop == measured.flop
    peak = planned.weights + measured.arena_bytes + measured.scratch_bytes
    assert planned.peak == near(0.1, peak)
    assert planned.scratch == near(0.1, measured.scratch_bytes)


def test_memory_of_the_bundled_model_is_within_a_tenth_of_what_a_batch_takes() -> None:
    demo = ROOT / "nsp/demo"
    assert_as_measured(demo, plan_model(str(demo), batch=2, precision="fp32", on="cpu"))


def test_memory_of_a_tiny_model_of_each_family_is_that_of_a_batch(
    small_checkpoint: Path, other_checkpoint: Path
) -> None:
    for folder in (small_checkpoint, other_checkpoint):
        assert_as_measured(folder, plan_model(str(folder), batch=3, precision="fp32", on="cpu"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_are_within_a_tenth_of_those_in_the_exported_graphs(
    precision: str, small_checkpoint: Path, half_engines: tuple[Path, Manifest]
) -> None:
    folder, manifest = half_engines
    measured = 0
    for variants in manifest.stages.values():
        variant = next(each for each in variants if each.precision == precision)
        graph = onnx.load(folder / next(iter(variant.files))).graph
        measured += sum(numpy_helper.to_array(each).nbytes for each in graph.initializer)
    planned = plan_model(str(small_checkpoint), batch=1, precision=precision, on="cpu")
    assert planned.weights == near(0.1, measured)


@pytest.mark.parametrize("name", ["var", "next_scale"])
def test_training_memory_is_within_a_fifth_of_that_of_real_steps(
    name: str, small_checkpoint: Path, other_checkpoint: Path
) -> None:
    folder = small_checkpoint if name == "var" else other_checkpoint
    planned = plan_model(str(folder), batch=1, precision="fp32", on="cpu")
    owner = family(name)
    for phase in planned.training:
        system = read_checkpoint(folder).load().requires_grad_(True)
        config = system.config
        objective = owner.learner.objective(
            phase.name, {}, system, TrainingData(no_pictures(config))
        )
        weights = {id(each): each for each in (*objective.parameters(), *objective.buffers())}
        batch = blank_batch(owner.condition(config), config.image_size_px, phase.batch_size)
        learning = [each for each in objective.trained.parameters() if each.requires_grad]
        average = [each.detach().clone() for each in learning] if phase.memory.average else []
        optimizer = torch.optim.AdamW(learning, fused=True)
        objective.train()
        with Watch(weights) as watch:
            for step in range(2):
                objective.before_step(step, 10)
                objective(batch)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        kept = sum(each.numel() * each.element_size() for each in (*weights.values(), *average))
        assert phase.memory.total == near(0.2, kept + watch.peak_bytes()), phase.name


def no_pictures(config: Any) -> Any:
    """Return a data set of which nothing is read."""
    from nsp.data.dataset import ImageDataset
    from nsp.data.sources import ImageSource, Sample

    blank = ImageSource((Sample(name="blank", captions=("",), class_id=0),), (), ())
    return ImageDataset(blank, config.image_size_px, train=True, crop=False)


def test_a_size_nobody_has_made_is_planned_in_every_precision_of_its_device() -> None:
    """VAR d16, 256 px: 0.60 TFLOP in the scales of an image with guidance, 0.39 in its decoder."""
    plan = plan_model("var/d16", batch=1, precision="fp16", on="h200")
    assert plan.flop == near(0.05, 0.60e12 + 0.394e12)
    assert plan.arena == 2 * 16 * 680 * 2 * 1024 * 2  # keys and values, layers, tokens, rows, width
    assert plan.fits
    assert plan.floor_ms is not None
    assert plan.floor_ms > 1e-9 * plan.flop / 989.5
    assert 2 * 310e6 < plan.weights < 2 * 420e6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "var/d61"}, "nearest is var/d16"),
        ({"on": "h20"}, "nearest is h200"),
        ({"precision": "f16"}, "nearest is fp16"),
        ({"precision": "int8", "on": "l4"}, "int8 does not run on l4; it has fp32, fp16, bf16"),
    ],
)
def test_what_is_unknown_names_the_nearest(wrong: dict[str, str], message: str) -> None:
    asked = {"model": "var/tiny", "precision": "fp32", "on": "cpu", **wrong}
    with pytest.raises(ConfigError, match=message):
        plan_model(asked.pop("model"), batch=1, **asked)


def test_a_batch_that_would_take_minutes_to_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch must be at most 4096"):
        plan_model("var/tiny", batch=10**9, precision="fp32", on="cpu")


def test_a_size_whose_recipe_needs_data_is_planned_with_its_phases() -> None:
    plan = plan_model("next_scale/sdxl", batch=1, precision="fp16", on="h200")
    assert plan.recipe == "next_scale_sdxl"
    assert [phase.name for phase in plan.training] == ["scales"]


def test_another_folder_is_refused_as_what_it_is(tmp_path: Path) -> None:
    run, engines = tmp_path / "run", tmp_path / "engines"
    for file in (run / "run.json", run / "checkpoint/config.json", engines / "manifest.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    for folder, message in ((run, "a training run; use: .*/run/checkpoint"), (engines, "engine")):
        with pytest.raises(CheckpointError, match=message):
            plan_model(str(folder), batch=1, precision="fp32", on="cpu")


def test_a_family_of_another_package_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "new_family")
    table = {**registry.BUILT_IN, "raster": "raster_family:Raster"}
    monkeypatch.setattr(registry, "_PLUGINS", Plugins("nsp.families", table))
    registry.family.cache_clear()
    try:
        plan = plan_model("raster/tiny", batch=2, precision="fp16", on="l4")
    finally:
        registry.family.cache_clear()
    assert plan.arena == 0  # it has no cache
    assert plan.floor_ms is not None
    assert [phase.name for phase in plan.training] == ["pixels"]


def test_the_verb_prints_a_table_and_the_same_as_json(small_checkpoint: Path) -> None:
    told = CliRunner().invoke(main, ["plan", str(small_checkpoint), "--batch", "2"])
    assert told.exit_code == 0, told.output
    for row in ("weights", "KV arena", "scratch", "peak", "operations", "training memory"):
        assert row in told.output
    asked = ["plan", str(small_checkpoint), "--batch", "2", "--json"]
    values = json.loads(CliRunner().invoke(main, asked).output)
    assert values["peak"] == values["weights"] + values["arena"] + values["scratch"]
    assert values["floor_ms"] is None  # nothing is known of a CPU in advance
    assert [phase["name"] for phase in values["training"]]


def test_devices_and_precisions_are_completed() -> None:
    words = {"COMP_WORDS": "nsp plan var/d16 --device ", "COMP_CWORD": "4"}
    told = CliRunner().invoke(
        main, env={"_NSP_COMPLETE": "bash_complete", **words}, prog_name="nsp"
    )
    assert [line.partition(",")[2] for line in told.output.split()] == list(DEVICES)
