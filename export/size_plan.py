"""What a model takes before it exists: weights, memory, operations and time, for `nsp plan`.

The model is built without content, so that one larger than this machine is planned on it. One batch
is generated and one step of each phase is trained on tensors of which only the shapes are computed
(nsp/pipeline/dry_run.py, nsp/training/memory_need.py).
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nsp.artifacts.checkpoint import is_checkpoint, read_checkpoint
from nsp.artifacts.counting import emptied
from nsp.artifacts.manifest import PRECISION_DTYPES
from nsp.artifacts.model_parts import load_text_model
from nsp.artifacts.weight_kinds import count_weights, matches
from nsp.data.dataset import ImageDataset
from nsp.data.sources import ImageSource, Sample, open_source
from nsp.errors import CheckpointError, ConfigError
from nsp.export.devices import Device, device
from nsp.export.graph.dtypes import stored_precision
from nsp.export.targets import TARGETS
from nsp.family.contract import AnyFamily, Stage
from nsp.family.objective import TrainingData
from nsp.family.recipe import PhaseConfig, RunConfig
from nsp.family.recipes import Recipe
from nsp.family.registry import family, family_names
from nsp.family.system import System
from nsp.paths import wrong_path
from nsp.pipeline.dry_run import DryRun, StageCall, generate_dry
from nsp.text.parts import TextEncoderSettings
from nsp.text.tokenizer import PromptTokenizer
from nsp.training.memory_need import TrainingMemory, blank_batch, training_memory
from nsp.values import choice, count

# Measured for the bundled models on one core: an ONNX graph without weights, and the time to trace
# a stage, check it and compare it with PyTorch.
GRAPH_BYTES = 1 << 18
_SECONDS_PER_STAGE = 4.0
_REFERENCE_GFLOP_S = 30.0  # of PyTorch on one core, which makes the images of the comparison
_MAX_BATCH = 4096  # every image is an order with its own random numbers


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a training."""

    name: str
    batch_size: int  # pictures of a micro-batch
    memory: TrainingMemory


@dataclass(frozen=True, kw_only=True)
class SizePlan:
    """The plan of one model for one batch on one device; sizes in bytes."""

    model: str
    image_size_px: int
    precision: str
    batch: int
    device: Device
    num_weights: int
    weights: int
    arena: int
    scratch: int
    flop: int
    moved: int
    floor_ms: float | None  # None: nothing is known of the device
    folder: int
    export_s: float
    training: tuple[PhasePlan, ...]
    recipe: str

    @property
    def peak(self) -> int:
        """Weights, arena and scratch together."""
        return self.weights + self.arena + self.scratch

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits the device's memory; None if that is not known."""
        memory = self.device.memory_gb
        return None if memory is None else self.peak <= 1e9 * memory

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, JSON-ready."""
        values = dataclasses.asdict(self)
        for phase, planned in zip(values["training"], self.training, strict=True):
            phase["memory"]["total"] = planned.memory.total
        return {**values, "peak": self.peak, "fits": self.fits}


@dataclass(frozen=True)
class _Model:
    """A model without content, and how it is trained."""

    name: str
    family: AnyFamily
    system: System
    sampling: Mapping[str, Any]
    phases: Sequence[PhaseConfig]
    recipe: str


def plan_model(model: str, *, batch: int, precision: str, on: str) -> SizePlan:
    """Return the plan of a checkpoint folder, or of a named size such as "FAMILY/SIZE".

    Raises ConfigError, naming the nearest valid one, for an unknown size, precision or device.
    """
    where = device(on)
    count("batch", batch, most=_MAX_BATCH)
    choice("precision", precision, PRECISION_DTYPES)
    target = TARGETS[where.target]
    if precision not in target.precisions:
        raise ConfigError(
            f"precision {precision} does not run on {on}; it has {', '.join(target.precisions)}"
        )
    found = _checkpoint(Path(model)) if is_checkpoint(Path(model)) else _named(model)
    # Where the past is padded, a loop of a thousand short steps has calls of few sizes to count.
    layout = found.family.layout(["fixed", *target.kv_layouts])
    dtype = PRECISION_DTYPES[precision]
    stages = found.family.stages(found.system.config, kv_layout=layout, dtype=dtype)
    made = _dry(found, stages, batch, layout, precision)
    shapes = {name: tuple(each.shape) for name, each in found.system.state_dict().items()}
    counts = [count_weights(stage, shapes) for stage in stages.values()]
    weights = sum(each.num_bytes(precision) for each in counts)
    costs = [_Cost.of(call, made, stages, shapes, precision) for call in made.calls]
    return SizePlan(
        model=found.name,
        image_size_px=found.system.config.image_size_px,
        precision=precision,
        batch=batch,
        device=where,
        num_weights=sum(each.half + each.int8 + each.full for each in counts),
        weights=weights,
        arena=made.arena_bytes,
        scratch=made.scratch_bytes,
        flop=made.flop,
        moved=sum(cost.moved for cost in costs),
        floor_ms=_floor_ms(costs, where),
        folder=weights + GRAPH_BYTES * len(stages),
        export_s=_export_s(found, stages, made.flop / batch),
        training=tuple(_phases(found)),
        recipe=found.recipe,
    )


@dataclass(frozen=True)
class _Cost:
    """One call: operations, bytes and the precision of its weights."""

    flop: int
    moved: int
    precision: str

    @classmethod
    def of(
        cls,
        call: StageCall,
        run: DryRun,
        stages: Mapping[str, Stage],
        shapes: Mapping[str, tuple[int, ...]],
        precision: str,
    ) -> "_Cost":
        stage = stages[call.stage]
        read = {name: shapes[name] for name in run.read[call.stage] if name in shapes}
        weights = count_weights(stage, read).num_bytes(precision)
        return cls(call.flop, weights + call.io_bytes, stored_precision(stage, precision))


def _floor_ms(costs: Sequence[_Cost], where: Device) -> float | None:
    """Return the time that operations and bytes take at least, stage after stage."""
    bandwidth, rates = where.bandwidth_gb_s, where.tflop_s
    if bandwidth is None:
        return None
    return sum(
        max(1e-9 * cost.flop / rates[cost.precision], 1e-6 * cost.moved / bandwidth)
        for cost in costs
    )


def _export_s(model: _Model, stages: Mapping[str, Stage], flop_per_image: float) -> float:
    """Return about how long an export to ONNX takes on one core of a processor."""
    sampling = model.family.sampling.from_dict(dict(model.sampling))
    images = sum(map(len, model.family.examples(model.system.config, sampling)))
    return _SECONDS_PER_STAGE * len(stages) + 1e-9 * images * flop_per_image / _REFERENCE_GFLOP_S


def _dry(
    model: _Model, stages: Mapping[str, Stage], batch: int, layout: str, precision: str
) -> DryRun:
    """Generate one batch with the model's own settings and the first of its example conditions."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = getattr(torch, PRECISION_DTYPES[precision])
    half = [pattern for stage in stages.values() for pattern in stage.half]
    names = (name for name, _ in model.system.named_parameters() if matches(name, half))
    system = emptied(model.system, mode, dict.fromkeys(names, dtype))
    sampling = model.family.sampling.from_dict(dict(model.sampling))
    first = model.family.examples(system.config, sampling)[0][0]
    orders = [dataclasses.replace(first, seed=seed) for seed in range(batch)]
    return generate_dry(
        model.family,
        system,
        orders,
        kv_layout=layout,
        kv_dtype=PRECISION_DTYPES[precision],
        mode=mode,
    )


def _phases(model: _Model) -> list[PhasePlan]:
    """Return the memory of every phase, at its own batch size."""
    owner, config = model.family, model.system.config
    blank = ImageSource((Sample(name="blank", captions=("",), class_id=0),), (), ())
    data = TrainingData(ImageDataset(blank, config.image_size_px, train=True, crop=False))
    plans = []
    for phase in model.phases:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        system = emptied(model.system, mode).requires_grad_(True)
        make = owner.learner.objective
        try:
            objective = make(phase.name, phase.objective, system, data)
        except ConfigError:  # settings of another size
            objective = make(phase.name, {}, system, data)
        size = max(1, phase.batch_size // phase.accumulate)
        memory = training_memory(
            objective,
            batch=blank_batch(owner.condition(config), config.image_size_px, size),
            is_averaged=phase.ema_decay > 0,
            mode=mode,
        )
        plans.append(PhasePlan(phase.name, size, memory))
    return plans


def _named(model: str) -> _Model:
    """Return the model of a named size, trained as the recipe of that size says."""
    name, _, size = model.partition("/")
    known = [f"{each}/{one}" for each in family_names() for one in family(each).sizes]
    if model not in known and os.path.lexists(model):
        raise CheckpointError(wrong_path(Path(model), "--start-from"))
    choice("model (neither a checkpoint folder nor FAMILY/SIZE)", model, known)
    owner = family(name)
    config = owner.sizes[size]
    recipe, run = _recipe(owner, config.to_dict(), size)
    source = ImageSource((), (), ())
    if owner.condition(config) == "prompt":
        source = open_source("emoji")  # its captions make the prompt tokenizer
    with torch.device("meta"):
        system = owner.learner.new_system(
            config, TextEncoderSettings.from_dict(run.text_encoder), source
        )
    return _Model(model, owner, system.eval(), run.sampling, run.phases, recipe)


def _recipe(
    owner: AnyFamily, model: Mapping[str, Any], size: str | None = None
) -> tuple[str, RunConfig]:
    """Return the recipe that trains this model, or else the family's first one, and its name.

    Recipes say with which options they can be planned, without data. One whose model is another of
    the family's sizes is asked for this `size`, if it takes one.
    """
    named = [Recipe(name, owner.name, make) for name, make in owner.recipes.items()]
    runs = {
        each.name: each.run(**options) for each in named if (options := each.planned_as) is not None
    }
    if not runs:
        raise ConfigError(f"family {owner.name} has no recipe that can be planned without its data")
    own = [name for name, run in runs.items() if run.model == model]
    if not own and size is not None:
        for each in named:
            if "size" in (parameter.name for parameter in each.parameters) and each.name in runs:
                run = each.run(**{**(each.planned_as or {}), "size": size})
                if run.model == model:
                    return each.name, run
    name = own[0] if own else next(iter(runs))
    return name, runs[name]


def _checkpoint(folder: Path) -> _Model:
    """Return the model of a checkpoint, of which only text encoder and tokenizer are read."""
    record = read_checkpoint(folder)
    owner = record.family
    config = owner.config.from_dict(record.config)
    encoder, tokenizer = None, None
    if owner.condition(config) == "prompt":
        tokenizer = PromptTokenizer.load(folder / "tokenizer")
        encoder = load_text_model(folder / "text_encoder")
    with torch.device("meta"):
        system = owner.learner.build(config, text_encoder=encoder, prompt_tokenizer=tokenizer)
    recipe, run = _recipe(owner, dict(record.config))
    notes = record.notes.get("run")
    if isinstance(notes, Mapping) and "phases" in notes:
        recipe, run = "its own run", RunConfig.from_dict(notes)
    return _Model(str(folder), owner, system.eval(), record.sampling, run.phases, recipe)
