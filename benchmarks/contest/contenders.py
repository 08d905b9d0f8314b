"""Who takes part: one record per way to run a model, for every family and device.

A contender is loaded from a place, a checkpoint or an engine folder, in this process or in a fresh
one. To add one, add its record to CONTENDERS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nsp.artifacts.manifest import Manifest, read_manifest
from nsp.backends.available import backend_names
from nsp.benchmarks.contest.names import NAMES
from nsp.errors import BackendError, ConfigError
from nsp.family.gate import Tokens
from nsp.pipeline.pipeline import Pipeline, load_pipeline

ENGINES, BASELINE = "engines", "torch"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What can be loaded here and by a fresh process: a contender and where it lies."""

    label: str  # what tables call it
    path: Path  # an engine folder or a checkpoint, as the contender needs
    backend: str = BASELINE
    options: Mapping[str, Any] = field(default_factory=dict)  # precision, device, num_threads
    contender: str = ENGINES

    def load(self) -> Pipeline:
        """Return the pipeline; raise NspError where it cannot be loaded or run here."""
        return CONTENDERS[self.contender].load(self)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {**vars(self), "path": str(self.path), "options": dict(self.options)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Source":
        """Return the source written by `to_dict`."""
        return cls(**{**values, "path": Path(values["path"])})


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to run a model."""

    name: str
    what: str  # in words
    load: Callable[[Source], Pipeline]
    devices: tuple[str, ...] = ("cpu", "cuda")  # where it can be timed
    by_default: tuple[str, ...] = ("cpu", "cuda")  # where a full benchmark times it
    from_checkpoint: bool = True  # needs the PyTorch model; else the engine folder

    def check(self, device: str) -> None:
        """Raise BackendError where it is not timed."""
        if device not in self.devices:
            only = "a CPU" if self.devices == ("cpu",) else "a GPU"
            raise BackendError(f"it is timed only on {only}, but the engines run on {device}")


def _load(source: Source) -> Pipeline:
    return load_pipeline(source.path, source.backend, **source.options)


def _reference(source: Source) -> tuple[Pipeline, Any]:
    """Return the plain PyTorch pipeline of a checkpoint on a CPU, and its system."""
    from nsp.artifacts.checkpoint import read_checkpoint

    reference = load_pipeline(source.path, BASELINE, device="cpu")
    return reference, read_checkpoint(source.path).load()


def _torch(make: str) -> Callable[[Source], Pipeline]:
    """Return what loads a checkpoint by a function of `torch_recorded`, in a precision."""

    def load(source: Source) -> Pipeline:
        from nsp.artifacts.checkpoint import read_checkpoint
        from nsp.benchmarks.peers import torch_recorded

        record = read_checkpoint(source.path)
        kept = {n: v for n, v in source.options.items() if n in ("precision", "device", "compiler")}
        if make != "compiled":
            kept.pop("compiler", None)
        pipeline: Pipeline = getattr(torch_recorded, make)(record.family, record.load(), **kept)
        pipeline.sampling = record.family.sampling.from_dict(record.sampling)
        return pipeline

    return load


def _compiled(source: Source) -> Pipeline:
    """Return every stage compiled: in the default mode on a CPU, recorded on a GPU."""
    if source.options.get("device", "cpu") != "cpu" or "compiler" in source.options:
        return _torch("compiled")(source)
    from nsp.backends.torch import TorchBackend

    reference, system = _reference(source)
    stages = reference.family.learner.modules(system, "delta")
    for module in stages.values():
        module.compile()
    reference.backend = TorchBackend(
        stages, reference.backend.stages_io, kv_layout="delta", device="cpu"
    )
    return _fresh(reference)


def _plain_onnx(source: Source) -> Pipeline:
    from nsp.benchmarks.peers.plain_onnx import plain_onnx

    reference, system = _reference(source)
    reference.backend = plain_onnx(reference, system, threads=source.options["num_threads"])
    return _fresh(reference)


def _fresh(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with its present backend throughout, its text encoder's too."""
    from nsp.benchmarks.contest.clocked import with_backend

    return with_backend(pipeline, pipeline.backend)


def _onnxruntime_graphs(source: Source) -> Pipeline:
    """Return the engines of ONNX Runtime with CUDA graphs, which `load_pipeline` leaves off."""
    from nsp.backends.onnxruntime.ort_backend import CUDA, OnnxRuntimeBackend

    pipeline = _load(replace(source, backend="onnxruntime"))
    manifest = read_manifest(source.path)
    loaded = {
        stage: next(v for v in manifest.variants(stage, "onnxruntime") if _is_used(v, pipeline))
        for stage in manifest.stages
    }
    pipeline.backend = OnnxRuntimeBackend(
        {stage: source.path / next(iter(variant.files)) for stage, variant in loaded.items()},
        pipeline.backend.stages_io,
        kv_layout=pipeline.backend.kv_layout,
        providers=(CUDA,),
        cuda_graphs=True,
    )
    return _fresh(pipeline)


def _is_used(variant: Any, pipeline: Pipeline) -> bool:
    return bool(variant.precision == pipeline.precision)


CONTENDERS: Mapping[str, Contender] = {
    each.name: each
    for each in (
        Contender(name=ENGINES, what="exported engines", load=_load, from_checkpoint=False),
        Contender(
            name="torch eager",
            what="PyTorch's modules in the precision of the engines",
            load=_torch("eager"),
            by_default=("cuda",),
        ),
        Contender(
            name="torch graphs",
            what="the same, attending in place, recorded as one CUDA graph",
            load=_torch("graphed"),
            by_default=("cuda",),
        ),
        Contender(
            name="torch.compile",
            what="PyTorch with torch.compile: default mode on a CPU; on a GPU max-autotune in the "
            "precision of the engines, recorded as one CUDA graph",
            load=_compiled,
        ),
        Contender(
            name="plain-onnx",
            what="torch.onnx.export as it stands, caches joined in the graph and handed over as "
            "new arrays, ONNX Runtime with default options",
            load=_plain_onnx,
            devices=("cpu",),
        ),
        Contender(
            name="onnxruntime graphs",
            what="the engines of ONNX Runtime, recorded as CUDA graphs",
            load=_onnxruntime_graphs,
            devices=("cuda",),
            from_checkpoint=False,
        ),
    )
}


def check_name(name: str) -> None:
    """Raise ConfigError for a contender there is not."""
    if name not in NAMES and name not in backend_names():
        raise ConfigError(f"contender {name!r} is unknown; known: {', '.join(NAMES)}, or a backend")


def gate_words(manifest: Manifest, backend: str, precision: str) -> str:
    """Return what the export's gate measured of the logits in this precision, or nothing."""
    declared = manifest.family_record.stages(
        manifest.model_config, kv_layout=manifest.family_record.kv_layouts[0], dtype="float32"
    )
    for stage in manifest.stages:
        gate = declared[stage].gate
        for variant in manifest.variants(stage, backend):
            if isinstance(gate, Tokens) and variant.precision == precision:
                return _gate_words(variant.parity, gate.logits)
    return ""


def _gate_words(parity: Mapping[str, Any], logits: str) -> str:
    units = [each for each in parity.get("units", ()) if "tokens" in each]
    if not units:
        return ""
    error = parity["outputs"][logits]["relative"]
    count = sum(each["tokens"] for each in units)
    equal = sum(each["tokens"] * each["agreement"] for each in units) / count
    worst = min(each["agreement"] for each in units)
    return (
        f": at its export the logits were off by at most {100 * error:.2g} % of their "
        f"range, and {100 * equal:.4g} % of {count} sampled tokens were PyTorch's "
        f"({100 * worst:.4g} % in the worst part)"
    )
