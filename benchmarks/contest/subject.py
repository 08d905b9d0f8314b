"""What a benchmark runs on: an engine folder and, beside it, the PyTorch model it was made from."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsp.artifacts.checkpoint import is_checkpoint, read_checkpoint
from nsp.artifacts.costs import StageCosts, read_costs
from nsp.artifacts.manifest import Manifest, read_manifest
from nsp.artifacts.repair import find_source
from nsp.backends.available import availability, backend_record
from nsp.benchmarks.contest.contenders import BASELINE, Source
from nsp.benchmarks.record.result import Model
from nsp.console import common_options
from nsp.errors import BackendError, CheckpointError
from nsp.pipeline.keywords import LoadOptions
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from nsp.walk import files_below

logger = logging.getLogger(__name__)

# Captions of the embedded data set, short and long.
CAPTIONS = (
    "red apple",
    "grinning face",
    "basketball",
    "woman firefighter medium-dark skin tone",
    "dove",
    "beating heart",
    "person swimming medium-light skin tone",
    "couple with heart woman man dark skin tone medium-dark skin tone",
)


@dataclass(frozen=True, kw_only=True)
class Side:
    """Engines or baseline: loaded here, and loadable again by a fresh process."""

    source: Source
    pipeline: Pipeline

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.source.label


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Both sides. Exactly one of `baseline` and `baseline_missing` is None."""

    contender: Side
    baseline: Side | None
    device: str = "cpu"  # of both
    baseline_missing: str | None = None  # why there is none
    weights_mib: Mapping[str, float]  # on disk, per side
    costs: Mapping[str, StageCosts] = field(default_factory=dict)  # counted at export

    @property
    def sides(self) -> tuple[Side, ...]:
        """Those that are there, the engines first."""
        return (self.contender,) if self.baseline is None else (self.contender, self.baseline)

    @property
    def checkpoint(self) -> Path | None:
        """Where the PyTorch model lies, if there is one."""
        return None if self.baseline is None else self.baseline.source.path

    def conditions(self, count: int) -> dict[str, list[Any]]:
        """Return `count` prompts, or class ids over all classes, as `generate` takes them.

        Nothing for a model without condition.
        """
        pipeline = self.contender.pipeline
        if pipeline.family.condition(pipeline.config) == "none":
            return {}
        if (tokenizer := pipeline.tokenizer) is not None:
            whole = [text for text in CAPTIONS if tokenizer.truncated(text) is None] or CAPTIONS
            return {"prompts": [whole[i % len(whole)] for i in range(count)]}
        classes = pipeline.config.num_classes
        return {"class_ids": [i * classes // count for i in range(count)]}

    def request(self, count: int, seed: int) -> dict[str, Any]:
        """Return what `generate` takes for `count` images; without condition every one its seed."""
        asked = self.conditions(count)
        return {**asked, "seed": seed if asked else [seed + number for number in range(count)]}

    def requests(self, count: int, size: int, seed: int) -> list[dict[str, Any]]:
        """Return what `generate` takes for `count` images, `size` of them at a time."""
        asked = self.request(count, seed)
        lists = {name: each for name, each in asked.items() if isinstance(each, list)}
        return [
            {**asked, **{name: each[start : start + size] for name, each in lists.items()}}
            for start in range(0, count, size)
        ]

    def titles(self, count: int, seed: int) -> tuple[str, ...]:
        """Return what each of `count` images is requested with, in words."""
        asked = self.conditions(count)
        named = next(iter(asked.values()), [f"seed {seed + number}" for number in range(count)])
        return tuple(str(each) for each in named)

    def model(self) -> Model:
        """Return what bench.json says about the contender's model."""
        pipeline = self.contender.pipeline
        config, backend = pipeline.config, pipeline.backend
        grids = pipeline.family.grids(config)
        cache = pipeline.family.cache(config, 1, backend.kv_dtype())
        return Model(
            family=pipeline.family.name,
            model_hash=pipeline.model_hash,
            backend=backend.name,
            device=self.device,
            precision=pipeline.precision,
            kv_dtype=backend.kv_dtype(),
            kv_layout=backend.kv_layout,
            schedule=tuple(h for h, _ in grids),
            num_tokens=sum(h * w for h, w in grids),
            num_layers=0 if cache is None else cache.num_layers,
            image_size_px=config.image_size_px,
            sampling=pipeline.sampling.to_dict(),
            weights_mib=dict(self.weights_mib),
            read_mib={
                stage: costs.read_bytes(pipeline.precision) / 2**20
                for stage, costs in self.costs.items()
            },
        )


def load_subject(
    engine_dir: Path,
    *,
    checkpoint: Path | None,
    backend: str,
    precision: str | None,
    threads: int,
) -> Subject:
    """Return the engines of `engine_dir` and their PyTorch model, both loaded.

    Without `checkpoint` the model is looked for where the manifest says the engines come from, and
    may be missing. Raises EngineError or BackendError for engines that cannot be loaded, and
    CheckpointError or BackendError for a `checkpoint` that cannot be the baseline.
    """
    manifest = read_manifest(engine_dir)
    options: LoadOptions = {"num_threads": threads, "precision": precision}
    pipeline = load_pipeline(engine_dir, backend, **options)
    name = pipeline.backend.name
    device = availability(name).device or "cpu"
    contender = Side(
        source=Source(label=name, path=engine_dir, backend=name, options=options), pipeline=pipeline
    )
    weights = {name: _engines_mib(manifest, engine_dir, pipeline)}
    costs = read_costs(manifest)
    if not costs:
        logger.warning("%s was exported before costs were counted: no rates", engine_dir)
    try:
        folder = checkpoint or find_source(engine_dir, manifest)
        baseline = _load_baseline(folder, manifest.model_hash, device=device)
    except (CheckpointError, BackendError) as error:
        if checkpoint is not None:
            raise
        logger.warning("no PyTorch baseline: %s", error)
        return Subject(
            contender=contender,
            baseline=None,
            baseline_missing=str(error),
            device=device,
            weights_mib=weights,
            costs=costs,
        )
    weight_files = (path for path in files_below(folder) if path.suffix == ".safetensors")
    return Subject(
        contender=contender,
        baseline=baseline,
        device=device,
        weights_mib={**weights, BASELINE: _mib(weight_files)},
        costs=costs,
    )


def torch_threads(subject: Subject, threads: int) -> AbstractContextManager[None]:
    """Give PyTorch as many threads as the engines have, for as long as the block lasts."""
    return common_options.torch_threads(None if subject.baseline is None else threads)


def _load_baseline(folder: Path, model_hash: str, *, device: str) -> Side:
    """Return the PyTorch model; the error says why there is none and what to do."""
    if not is_checkpoint(folder):
        raise CheckpointError(
            f"there is no checkpoint at {folder}; "
            "give the one the engines were exported from with --checkpoint"
        )
    found = read_checkpoint(folder).weights_hash()
    if found != model_hash:
        raise CheckpointError(
            f"{folder} has model {found[:12]}, but the engines were made from {model_hash[:12]}; "
            "give that one with --checkpoint"
        )
    state = availability(BASELINE)
    if state.device != device:
        fix = f"; run: {state.install}" if state.install else ""
        raise BackendError(f"torch cannot run on the engines' {device}: {state.reason}{fix}")
    options: LoadOptions = {"device": device}
    source = Source(label=BASELINE, path=folder, backend=BASELINE, options=options)
    return Side(source=source, pipeline=load_pipeline(folder, BASELINE, **options))


def _engines_mib(manifest: Manifest, folder: Path, pipeline: Pipeline) -> float:
    """Return the size of the engine files that were loaded."""
    files = {
        name
        for stage in manifest.stages
        for variant in manifest.variants(stage, backend_record(pipeline.backend.name).built_for)
        if variant.precision == pipeline.precision
        for name in variant.files
    }
    return _mib(folder / name for name in files)


def _mib(paths: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 2**20
