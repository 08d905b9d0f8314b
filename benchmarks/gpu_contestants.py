"""Who takes part in the GPU suite, and how each is made ready from one random checkpoint."""

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.manifest import read_manifest
from nsp.backends.available import availability
from nsp.backends.onnxruntime.ort_backend import CUDA, OnnxRuntimeBackend
from nsp.benchmarks.peers import torch_recorded as baselines
from nsp.benchmarks.random_model import FAMILY
from nsp.errors import BackendError
from nsp.export.run import ExportOptions, export
from nsp.family.registry import family
from nsp.pipeline.pipeline import Pipeline, load_pipeline, torch_pipeline

logger = logging.getLogger(__name__)

REFERENCE = "torch fp32"  # what is correct


@dataclass(frozen=True, kw_only=True)
class Place:
    """One model size at one batch size: where its files are and how it is run."""

    folder: Path  # checkpoint/ and engines
    batch: int
    precision: str
    device: str
    compiler: str = "inductor"

    @property
    def checkpoint(self) -> Path:
        """The random weights."""
        return self.folder / "checkpoint"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {**vars(self), "folder": str(self.folder)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Place":
        """Return the place written by `to_dict`."""
        return cls(**{**values, "folder": Path(values["folder"])})


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant: how it is built, once, and loaded."""

    name: str
    load: Callable[[Place], Pipeline]
    target: str | None = None  # of its engines
    own_engines: bool = False  # for every batch size


def build(entry: Entry, place: Place) -> float | None:
    """Export the engines of a contestant and return the seconds its compiler or exporter took.

    None for those without engines. What is there and unchanged is reused. Raises NspError where it
    cannot run or be built here.
    """
    if entry.target is None:
        return None
    backend = entry.target.replace("-", "_")
    state = availability(backend)
    if not state.works or (place.device == "cuda" and state.device != "cuda"):
        raise BackendError(state.reason + (f"; run: {state.install}" if state.install else ""))
    folder = engine_dir(entry, place)
    export(
        ExportOptions(
            checkpoint=str(place.checkpoint),
            engine_dir=str(folder),
            precisions=(place.precision,),
            targets=(entry.target,),
            max_batch=place.batch,
            static_batch=entry.own_engines,
            gpu_archs=("current",) if entry.target == "tensorrt-rtx" else (),
        )
    )
    manifest = read_manifest(folder)
    return sum(variants[0].build_seconds for variants in manifest.stages.values())


def engine_dir(entry: Entry, place: Place) -> Path:
    """Return where the engines of a contestant lie."""
    return place.folder / (f"{entry.target}-b{place.batch}" if entry.own_engines else "onnxruntime")


def reference(place: Place) -> tuple[Pipeline, int]:
    """Return the model in float32 PyTorch on the device, and its transformer's parameters."""
    system = read_checkpoint(place.checkpoint).load()
    parameters = sum(p.numel() for p in system.predictor.parameters())
    return torch_pipeline(family(FAMILY), system, device=place.device), parameters


def free_memory() -> None:
    """Give back what dropped pipelines held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _torch(make: Callable[..., Pipeline], place: Place, **settings: Any) -> Pipeline:
    system = read_checkpoint(place.checkpoint).load()
    return make(family(FAMILY), system, precision=place.precision, device=place.device, **settings)


def _compiled(place: Place) -> Pipeline:
    return _torch(baselines.compiled, place, compiler=place.compiler)


def _engines(name: str, backend: str) -> Callable[[Place], Pipeline]:
    """Return what loads the engines of a contestant with a backend."""

    def load(place: Place) -> Pipeline:
        return load_pipeline(
            engine_dir(ENTRIES[name], place),
            backend,
            precision=place.precision,
            device=place.device,
        )

    return load


def _onnxruntime_graphs(place: Place) -> Pipeline:
    """Return the engines of ONNX Runtime with CUDA graphs, which `load_pipeline` leaves off."""
    if place.device != "cuda":
        raise BackendError("CUDA graphs need a GPU")
    pipeline = ENTRIES["onnxruntime"].load(place)
    folder = engine_dir(ENTRIES["onnxruntime"], place)
    files = {
        stage: folder / next(iter(variants[0].files))
        for stage, variants in read_manifest(folder).stages.items()
    }
    backend = OnnxRuntimeBackend(
        files,
        pipeline.backend.stages_io,
        kv_layout=pipeline.backend.kv_layout,
        providers=(CUDA,),
        cuda_graphs=True,
    )
    pipeline.backend = backend
    return pipeline


ENTRIES: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(name="torch eager", load=lambda place: _torch(baselines.eager, place)),
        Entry(name="torch graphs", load=lambda place: _torch(baselines.graphed, place)),
        Entry(name="torch compile", load=_compiled),
        Entry(
            name="onnxruntime",
            load=_engines("onnxruntime", "onnxruntime"),
            target="onnxruntime",
        ),
        Entry(name="onnxruntime graphs", load=_onnxruntime_graphs, target="onnxruntime"),
        Entry(
            name="tensorrt",
            load=_engines("tensorrt", "tensorrt"),
            target="tensorrt",
            own_engines=True,
        ),
        Entry(
            name="tensorrt-rtx",
            load=_engines("tensorrt-rtx", "tensorrt-rtx"),
            target="tensorrt-rtx",
            own_engines=True,
        ),
    )
}
EAGER = "torch eager"
