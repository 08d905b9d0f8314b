"""Chooses the backend for an engine folder, and one variant of every stage."""

import logging
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nsp.artifacts.manifest import PRECISION_DTYPES, Manifest, Variant
from nsp.artifacts.repair import repair
from nsp.backends.available import (
    BACKENDS,
    BackendRecord,
    Device,
    availability,
    backend_record,
)
from nsp.backends.nvidia import find_gpu
from nsp.errors import BackendError, ConfigError, EngineError
from nsp.stage.io import StageIO

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VariantSet:
    """One variant of every stage; all have the same cache layout and cache dtype."""

    precision: str
    kv_layout: str
    stages: Mapping[str, Variant]


def choose_backend(
    folder: Path, manifest: Manifest, name: str, device: Device | None
) -> tuple[BackendRecord, Device]:
    """Return the backend `name`, or for "auto" the registry's first that works, and its device.

    Raises ConfigError for an unknown backend, EngineError when the folder has no engines for it or
    they are for another machine, BackendError when it does not work here.
    """
    if name != "auto":
        record = backend_record(name)
        if record.runs != "engines":
            raise ConfigError(
                f"{folder} has engines, which the {record.name} backend cannot run; "
                "use --backend auto, or give a checkpoint folder"
            )
        _check_complete(folder, manifest, record)
        _check_targets(folder, manifest, record)
        return record, _working_device(record, device)
    candidates = [BACKENDS[n] for n in BACKENDS if n in manifest.backends()]
    refusals = []
    for record in candidates:
        try:
            where = _working_device(record, device)
            _check_targets(folder, manifest, record)
        except (BackendError, EngineError) as error:
            refusals.append(str(error))
            continue
        logger.info(
            "%s: backend %s on %s%s",
            folder,
            record.name,
            where,
            f", because {'; '.join(refusals)}" if refusals else ", the first that works",
        )
        return record, where
    if not refusals:
        known = ", ".join(n for n, r in BACKENDS.items() if r.runs == "engines")
        raise EngineError(
            f"{folder}: no backend has an engine of every stage (known: {known}); "
            f"{repair(folder, manifest)}"
        )
    place = "on this machine" if device is None else f"on device {device} here"
    raise BackendError(f"{folder}: no backend works {place}: {'; '.join(refusals)}")


def _check_complete(folder: Path, manifest: Manifest, record: BackendRecord) -> None:
    """Raise EngineError when a stage has no engine for the backend."""
    again = repair(folder, manifest, backend=record.built_for)
    lacking = [stage for stage in manifest.stages if not manifest.variants(stage, record.built_for)]
    if len(lacking) == len(manifest.stages):
        held = ", ".join(manifest.backends()) or "no complete set"
        raise EngineError(f"{folder} has no engines for {record.name} (it has: {held}); {again}")
    if lacking:
        raise EngineError(
            f"{folder}: stage {lacking[0]} has no {record.name} engine, the export is incomplete; "
            f"{again}"
        )


def _working_device(record: BackendRecord, device: Device | None) -> Device:
    """Return the backend's device; raise BackendError if it does not work, or not on `device`."""
    state = availability(record.name)
    if not state.works or state.device is None:
        fix = f"; run: {state.install}" if state.install else ""
        raise BackendError(f"{record.name}: {state.reason}{fix}")
    if device is None:
        return state.device
    if device not in record.precisions:
        known = " or ".join(record.precisions)
        raise ConfigError(f"{record.name} runs on {known}, not on {device!r}")
    if device == "cuda" and state.device == "cpu":
        fix = f"; run: {state.install}" if state.install else ""
        raise BackendError(
            f"{record.name} cannot use a GPU on this machine: it {state.reason}{fix}"
        )
    return device


def _check_targets(folder: Path, manifest: Manifest, record: BackendRecord) -> None:
    """Raise EngineError when the backend's engines were built for another machine."""
    for stage in manifest.stages:
        for variant in manifest.variants(stage, record.built_for):
            if differences := list(_differences(record, variant)):
                again = repair(folder, manifest, backend=record.built_for)
                raise EngineError(
                    f"{folder}: the {record.name} engine of stage {stage} is for "
                    f"{'; '.join(differences)}; {again}"
                )


def _differences(record: BackendRecord, variant: Variant) -> Iterator[str]:
    """Yield each difference between the machine that an engine was built for and this one."""
    if record.portable:
        return
    here = {
        "os": platform.system().lower(),
        "machine": platform.machine(),
    }
    for name, found in here.items():
        built = variant.device.get(name)
        if built is not None and built != found:
            yield f"{name} {built}, but this machine has {found}"
    built, version = variant.tools.get(record.module), record.version()
    if built is not None and version is not None and built != version:
        yield f"{record.module} {built}, but {version} is installed"
    built, gpu = variant.device.get("compute_capability"), find_gpu()
    if built is not None and gpu is not None and gpu.compute_capability not in built.split():
        yield f"compute capability {built}, but {gpu.name} has {gpu.compute_capability}"


def complete_precisions(
    folder: Path, manifest: Manifest, record: BackendRecord, device: Device
) -> tuple[str, ...]:
    """Return the precisions in which a backend can run the folder's engines, preferred ones first.

    These are the ones that `choose_variants` accepts.
    """
    return tuple(
        each
        for each in _held(manifest, record, device)
        if isinstance(_set_in(folder, manifest, record, each), VariantSet)
    )


def _held(manifest: Manifest, record: BackendRecord, device: Device) -> Iterator[str]:
    """Yield the precisions of any of a backend's engines that it runs on a device."""
    variants = (manifest.variants(stage, record.built_for) for stage in manifest.stages)
    held = {variant.precision for each in variants for variant in each}
    yield from (each for each in record.precisions[device] if each in held)


def choose_variants(
    folder: Path,
    manifest: Manifest,
    record: BackendRecord,
    *,
    device: Device,
    precision: str | None,
) -> VariantSet:
    """Return one variant per stage, in the requested precision or the one the device prefers.

    A stage that exists in only one precision (sampling is always fp32) is used in any set that its
    tensors fit. Raises EngineError when no complete set exists, ConfigError for an unknown
    precision.
    """
    if precision is not None and precision not in PRECISION_DTYPES:
        known = ", ".join(PRECISION_DTYPES)
        raise ConfigError(f"precision {precision!r} is unknown; known: {known}")
    if precision is not None and precision not in record.precisions[device]:
        runs = " or ".join(record.precisions[device])
        raise ConfigError(f"{record.name} runs {runs} on {device}, not {precision}")
    wanted = (precision,) if precision else record.precisions[device]
    problem = ""
    for each in _held(manifest, record, device):
        if each not in wanted:
            continue
        found = _set_in(folder, manifest, record, each)
        if isinstance(found, VariantSet):
            return found
        problem = problem or found
    if not problem:
        held = {
            v.precision for s in manifest.stages for v in manifest.variants(s, record.built_for)
        }
        has = ", ".join(sorted(held))
        again = repair(folder, manifest, backend=record.built_for, precision=wanted[0])
        raise EngineError(
            f"{folder} has no {' or '.join(wanted)} engines for {record.name} (it has {has}); "
            f"{again}"
        )
    raise EngineError(f"{folder}: {problem}; {repair(folder, manifest)}")


def _set_in(
    folder: Path, manifest: Manifest, record: BackendRecord, precision: str
) -> VariantSet | str:
    """Return one variant per stage in the first cache layout that has them, or what is missing."""
    held = (v for s in manifest.stages for v in manifest.variants(s, record.built_for))
    problem = ""
    for layout in dict.fromkeys(variant.kv_layout for variant in held):
        declared = manifest.family_record.stages_io(
            manifest.model_config, kv_layout=layout, dtype=PRECISION_DTYPES[precision]
        )
        found = _fitting(folder, manifest, record, declared, precision)
        odd = [stage for stage in declared if stage not in found]
        if not odd:
            return VariantSet(precision, layout, {stage: found[stage] for stage in declared})
        problem = problem or _misfit(manifest, odd[0], precision)
    return problem


def _fitting(
    folder: Path,
    manifest: Manifest,
    record: BackendRecord,
    declared: Mapping[str, StageIO],
    precision: str,
) -> dict[str, Variant]:
    """Return the best variant of each stage that has variants with the declared tensors."""
    order = [precision, *(name for name in PRECISION_DTYPES if name != precision)]
    found = {}
    for stage, io in declared.items():
        variants = manifest.variants(stage, record.built_for) if stage in manifest.stages else []
        try:
            fitting = [variant for variant in variants if variant.stage_io == io and variant.files]
        except ConfigError as error:
            raise EngineError(
                f"{folder}: the manifest is damaged ({error}); {repair(folder, manifest)}"
            ) from error
        if fitting:
            found[stage] = min(fitting, key=lambda variant: order.index(variant.precision))
    return found


def _misfit(manifest: Manifest, stage: str, precision: str) -> str:
    if stage not in manifest.stages:
        return f"stage {stage} is missing because the export is incomplete"
    return (
        f"no {precision} engine of stage {stage} has the tensors that this nsp expects "
        "(perhaps another version exported it)"
    )
