"""The plan of an export: what is built for each target, what is reused, and why; no torch."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from nsp.artifacts.checkpoint import CheckpointRecord, read_checkpoint
from nsp.artifacts.manifest import PRECISION_DTYPES, Manifest, Variant
from nsp.export.built_for import built_for
from nsp.export.fingerprint import code_digest, fingerprint, tool_versions
from nsp.export.graph.dtypes import precision_map, stored_precision
from nsp.export.options import ExportOptions
from nsp.export.stage_bytes import stage_bytes
from nsp.export.store import EngineStore
from nsp.export.targets import Target, gpu_archs, resolve
from nsp.family.contract import Stage
from nsp.family.order import Sampling
from nsp.stage.backend import TENSORRT_RANKS
from nsp.stage.io import StageIO

logger = logging.getLogger(__name__)

_GRAPH_BYTES = 1 << 18  # an ONNX graph without weights
_PROFILE_BYTES = 3 << 20  # kernels and shapes of one engine profile, measured 1 to 3 MB

Action: TypeAlias = Literal["build", "reuse", "share"]


@dataclass(frozen=True, kw_only=True)
class PlannedBuild:
    """One stage for one target in one precision."""

    stage: str
    target: str
    backend: str
    precision: str
    stored_precision: str  # fp32 if the precision changes no weight of the stage
    kv_layout: str
    opset: int
    profiles: tuple[dict[str, Any], ...]
    max_batch: int | None
    gpu_archs: tuple[str, ...]
    built_for: dict[str, str]  # system and GPU of a compiled engine; an ONNX file fits any
    estimated_bytes: int
    precision_map: dict[str, str]
    tools: dict[str, str]
    io: StageIO
    fingerprint: str
    action: Action
    reason: str
    found: Variant | None = None  # the reused variant
    is_unpublished: bool = False  # whether it is from an interrupted export

    @property
    def folder(self) -> str:
        """Folder of its files in the engine folder, without the digest of their content."""
        return f"{self.stage}/{self.backend}-{self.stored_precision}"


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Everything an export needs to know before it starts."""

    options: ExportOptions
    record: CheckpointRecord
    config: Any
    sampling: Sampling
    model_hash: str
    builds: tuple[PlannedBuild, ...]


def make_plan(options: ExportOptions, store: EngineStore) -> ExportPlan:
    """Return the plan for `options` and the present content of the engine folder.

    Raises ConfigError, CheckpointError or BackendError for a request that cannot be met.
    """
    pairs = resolve(options)
    checkpoint = Path(options.checkpoint)
    record = read_checkpoint(checkpoint, verify=options.verify)
    config = record.family.config.from_dict(record.config)
    plan = ExportPlan(
        options=options,
        record=record,
        config=config,
        sampling=record.family.sampling.from_dict(record.sampling),
        model_hash=record.weights_hash(),
        builds=(),
    )
    builds: list[PlannedBuild] = []
    for target, precision in pairs:
        for build in _stages(plan, target, precision):
            builds.append(_decide(build, builds, plan, store))
    return replace(plan, builds=tuple(builds))


def _stages(plan: ExportPlan, target: Target, precision: str) -> list[PlannedBuild]:
    """Return the builds of one target and precision, before the decision to reuse them."""
    family, config, options = plan.record.family, plan.config, plan.options
    kv_layout = family.layout(target.layouts(precision), config)
    dtype = PRECISION_DTYPES[precision]
    stages = family.stages(config, kv_layout=kv_layout, dtype=dtype)
    sizes = stage_bytes(plan.record.folder, stages, precision)
    profiles = _profiles(plan, target, stages)
    archs = gpu_archs(target, options)
    machine = built_for(archs) if target.compiles else {}
    tools = {
        **tool_versions(),
        target.runtime.module: target.runtime.recorded_version() or "unknown",
    }
    code = code_digest(type(family))
    builds = []
    for stage, declared in stages.items():
        stored = stored_precision(declared, precision)
        dtypes = precision_map(declared, precision)
        mark = fingerprint(
            family=family.name,
            config=dict(plan.record.config),
            model=plan.model_hash,
            stage=stage,
            io=declared.io.to_dict(),
            backend=target.backend,
            kv_layout=kv_layout,
            opset=target.opset,
            dtypes=dtypes,
            profiles=profiles[stage],
            gpu_archs=archs,
            built_for=machine,
            tools=tools,
            code=code,
        )
        estimate = sizes[stage] + _GRAPH_BYTES + _PROFILE_BYTES * len(profiles[stage])
        builds.append(
            PlannedBuild(
                stage=stage,
                target=target.name,
                backend=target.backend,
                precision=precision,
                stored_precision=stored,
                kv_layout=kv_layout,
                opset=target.opset,
                profiles=profiles[stage],
                max_batch=options.max_batch if target.compiles else None,
                gpu_archs=archs,
                built_for=machine,
                estimated_bytes=estimate,
                precision_map=dtypes,
                tools=tools,
                io=declared.io,
                fingerprint=mark,
                action="build",
                reason="",
            )
        )
    return builds


def _profiles(
    plan: ExportPlan, target: Target, stages: Mapping[str, Stage]
) -> dict[str, tuple[dict[str, Any], ...]]:
    """Return {input: [min, opt, max]} for every stage's profiles; none if sizes are free."""
    if not target.compiles:
        return dict.fromkeys(stages, ())
    found = {}
    for name, stage in stages.items():
        spanned = stage.profiles(
            max_batch=plan.options.max_batch,
            static_batch=plan.options.static_batch,
            best_ranks=plan.sampling.num_ranks(stage.max_ranks),
            max_ranks=TENSORRT_RANKS,
        )
        found[name] = tuple(
            {n: [list(shape) for shape in bounds] for n, bounds in stage.io.profile(sizes).items()}
            for sizes in spanned
        )
    return found


def _decide(
    build: PlannedBuild, earlier: list[PlannedBuild], plan: ExportPlan, store: EngineStore
) -> PlannedBuild:
    """Return `build` with the decision to build or reuse it, and the reason."""
    for other in earlier:
        if other.fingerprint == build.fingerprint:
            reason = f"the precision changes no weight: same file as {other.precision}"
            return replace(build, action="share", reason=reason, estimated_bytes=0)
    if plan.options.rebuild:
        return replace(build, reason="a rebuild was requested")
    for manifest, why in (
        (store.previous, "unchanged: same model, code, settings and tools"),
        (store.staged, "finished before the export was interrupted"),
    ):
        variant = _same(manifest, build)
        if variant is not None and store.intact(variant):
            staged = manifest is store.staged
            return replace(build, action="reuse", reason=why, found=variant, is_unpublished=staged)
    return replace(build, reason=_why_build(build, plan, store))


def _same(manifest: Manifest | None, build: PlannedBuild) -> Variant | None:
    """Return the variant with the fingerprint of `build`."""
    variants = manifest.stages.get(build.stage, ()) if manifest else ()
    return next((v for v in variants if v.fingerprint == build.fingerprint), None)


def _why_build(build: PlannedBuild, plan: ExportPlan, store: EngineStore) -> str:
    """Return the reason why nothing can be reused."""
    manifest = store.previous
    if manifest is None:
        return "not exported yet"
    if manifest.model_hash != plan.model_hash:
        return "another model"
    old = next(
        (
            v
            for v in manifest.stages.get(build.stage, ())
            if (v.backend, v.precision) == (build.backend, build.precision)
        ),
        None,
    )
    if old is None:
        return "not exported yet"
    if old.fingerprint == build.fingerprint:
        return "its files are missing or damaged"
    for tool in sorted({*old.tools, *build.tools}):
        before, now = old.tools.get(tool), build.tools.get(tool)
        if before != now:
            return f"{tool} was {before or 'absent'} and is now {now or 'absent'}"
    for fact, now in build.built_for.items():
        if old.device.get(fact) != now:
            return f"built for {fact} {old.device.get(fact) or 'unknown'}, not {now}"
    if list(old.profiles) != list(build.profiles):
        return "other batch or profile sizes"
    return "other code of the model or of the export, or other settings"
