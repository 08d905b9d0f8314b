"""Builds one stage: module -> ONNX -> lint -> parity -> engine; failed builds are not kept."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from nsp.artifacts.counting import count_costs
from nsp.artifacts.manifest import PRECISION_DTYPES, Manifest, Variant
from nsp.backends.onnxruntime.ort_backend import CPU, OnnxRuntimeBackend
from nsp.backends.torch import TorchBackend
from nsp.distribution import version
from nsp.export.compile.engine import ENGINE_NAME, Engine, build_engine
from nsp.export.graph.lint import check_graph
from nsp.export.graph.narrow import at_precision
from nsp.export.graph.onnx_export import MODEL_NAME, export_stage
from nsp.export.graph.quantize import quantize, quantize_blocks
from nsp.export.plan import ExportPlan, PlannedBuild
from nsp.export.proof.gates import LIMITS
from nsp.export.proof.parity import Subject, check_stage
from nsp.export.proof.reference import Reference, record_reference
from nsp.export.proof.repro import reproducible
from nsp.export.proof.whole_images import check_images
from nsp.export.store import EngineStore, with_variant
from nsp.family.contract import Stage, trace_sizes
from nsp.stage.backend import Backend

logger = logging.getLogger(__name__)

Report: TypeAlias = Callable[[PlannedBuild, str, float, str], None]

# The fraction of a build that is done when a phase begins.
_START = {"onnx": 0.0, "lint": 0.5, "parity": 0.55, "build": 0.7}


class StageBuilder:
    """The model and its reference, from which stages are built."""

    def __init__(self, plan: ExportPlan, store: EngineStore, report: Report) -> None:
        self._plan, self._store, self._report = plan, store, report
        self._family = plan.record.family
        self._modules_key: tuple[str, str] | None = None
        self._modules: Mapping[str, nn.Module] = {}

    @cached_property
    def system(self) -> Any:
        """The model in float32."""
        return self._plan.record.load()

    @cached_property
    def reference(self) -> Reference:
        """The reference: the model's calls and images in PyTorch."""
        started = time.monotonic()
        reference = record_reference(self._plan, self.system)
        seconds = time.monotonic() - started
        logger.info("reference: %d images by PyTorch in %.1f s", reference.num_images, seconds)
        return reference

    def build(self, build: PlannedBuild) -> Variant:
        """Return the finished variant; its files are in the staging folder.

        Raises ExportError when a step fails and ParityError when the stage misses its gate.
        """
        started = time.monotonic()
        if "reference" not in self.__dict__:
            self._report(build, "reference", 0.0, "generating with PyTorch")
            _ = self.reference
        with self._store.new_folder() as folder:
            onnx_folder = folder / "onnx" if build.profiles else folder
            onnx_folder.mkdir(exist_ok=True)
            model = self._export(build, onnx_folder)
            parity = self._check(build, model)
            engine = Engine()
            if build.profiles:
                self._report(build, "build", _START["build"], "compiling")
                engine = build_engine(
                    build,
                    model,
                    folder / ENGINE_NAME,
                    timeout_s=self._plan.options.build_timeout_s,
                    timing_cache=self._store.timing_cache,
                    on_progress=lambda done, message: self._report(
                        build, "build", _START["build"] + (1 - _START["build"]) * done, message
                    ),
                )
                shutil.rmtree(onnx_folder)
            first = (ENGINE_NAME, MODEL_NAME)
            files = self._store.finish(folder, f"{build.folder}-", first=first)
        seconds = time.monotonic() - started
        logger.info("%s %s %s: %.1f s", build.stage, build.target, build.precision, seconds)
        return _variant(build, files, engine, parity, seconds)

    def _export(self, build: PlannedBuild, folder: Path) -> Path:
        """Write and lint the graph."""
        self._report(build, "onnx", _START["onnx"], "tracing")
        model = export_stage(
            self._stages(build)[build.stage],
            build.io,
            folder,
            name=build.stage,
            opset=build.opset,
            trace_sizes=trace_sizes(self._declared(build)),
            metadata=self._metadata(build.stage),
        )
        if build.stored_precision == "int8":
            # In this layout every call is of one token, and products of few rows read weights.
            narrow = quantize_blocks if build.kv_layout == "in_place" else quantize
            narrow(model)
        self._report(build, "lint", _START["lint"], "checking the graph")
        check_graph(model, build)
        return model

    def _metadata(self, stage: str) -> dict[str, str]:
        """Return the metadata of a graph."""
        grids = self._family.grids(self._plan.config)
        return {
            "family": self._family.name,
            "stage": stage,
            "model_hash": self._plan.model_hash,
            "schedule": " ".join(f"{height}x{width}" for height, width in grids),
            "nsp_version": version() or "unknown",
        }

    def _check(self, build: PlannedBuild, model: Path) -> dict[str, Any]:
        """Compare the graph with the reference."""
        self._report(build, "parity", _START["parity"], "comparing with PyTorch")
        backend, checked = self._checker(build, model)
        gate, recordings = self._declared(build)[build.stage].gate, self.reference.recordings
        with reproducible(
            backend,
            build.stage,
            [call for each in recordings for call in each.calls],
            allowed=partial(LIMITS[build.stored_precision].allowed, gate),
            graph=model if isinstance(backend, OnnxRuntimeBackend) else None,
            folder=self._store.folder,
        ) as watched:
            subject = Subject(
                stage=build.stage,
                io=build.io,
                gate=gate,
                backend=watched,
                precision=build.stored_precision,
                label=f"{build.stage} ({build.target} {build.precision})",
            )
            figures = check_stage(subject, recordings, self.reference.pipeline.backend)
        return {
            "checked": checked,
            "reference": "PyTorch float32, teacher-forced",
            "images": self.reference.num_images,
            **figures,
        }

    def _checker(self, build: PlannedBuild, model: Path) -> tuple[Backend, str]:
        """Return the backend that runs the stage for its check, and its name in words."""
        stages_io = {build.stage: build.io}
        if build.stored_precision == "bf16":
            # ONNX Runtime on a CPU has hardly any bfloat16 kernels.
            modules = self._stages(build)
            backend = TorchBackend(modules, stages_io, kv_layout=build.kv_layout, device="cpu")
            return backend, "the same modules in PyTorch bfloat16"
        files = {build.stage: model}
        runtime = OnnxRuntimeBackend(
            files,
            stages_io,
            kv_layout=build.kv_layout,
            providers=[CPU],
            num_threads=self._plan.options.num_threads,
        )
        runtime.wait()
        graph = "the graph it was compiled from" if build.profiles else "this graph"
        return runtime, f"{graph} in ONNX Runtime on a CPU"

    def _declared(self, build: PlannedBuild) -> Mapping[str, Stage]:
        """Return the declarations of a build's layout and precision."""
        return self._family.stages(
            self.system.config,
            kv_layout=build.kv_layout,
            dtype=PRECISION_DTYPES[build.precision],
        )

    def _stages(self, build: PlannedBuild) -> Mapping[str, nn.Module]:
        """Return the stage modules in the precision and layout of a build; the last are kept."""
        key = (build.precision, build.kv_layout)
        if self._modules_key != key:
            system = at_precision(self.system, self._declared(build), build.precision)
            self._modules_key = key
            self._modules = self._family.learner.modules(system, build.kv_layout)
        return self._modules

    def costs(self) -> dict[str, Any]:
        """Return what every stage costs, as the manifest has it."""
        started = time.monotonic()
        found = count_costs(self._family, self.system)
        logger.info("costs: %d stages counted in %.1f s", len(found), time.monotonic() - started)
        return {stage: costs.to_dict() for stage, costs in found.items()}

    def check_images(self, manifest: Manifest) -> Manifest:
        """Return the manifest with the results of whole images from its stages.

        Only ONNX Runtime can be run here; its results are kept with the last stage.
        """
        runnable = {(b.backend, b.precision): b for b in self._plan.builds if not b.profiles}
        for key, build in runnable.items():
            variants = {
                stage: next(v for v in each if (v.backend, v.precision) == key)
                for stage, each in manifest.stages.items()
            }
            self._report(build, "check", 0.0, "generating whole images")
            figures = check_images(
                self._plan,
                self.reference,
                {stage: self._store.path(v) for stage, v in variants.items()},
                {stage: v.stage_io for stage, v in variants.items()},
                kv_layout=build.kv_layout,
                precision=build.precision,
            )
            last = variants[build.stage]
            parity = {**last.parity, "free_running": figures}
            manifest = with_variant(manifest, build.stage, replace(last, parity=parity))
        return manifest


def _variant(
    build: PlannedBuild,
    files: dict[str, str],
    engine: Engine,
    parity: dict[str, Any],
    seconds: float,
) -> Variant:
    return Variant(
        backend=build.backend,
        precision=build.precision,  # type: ignore[arg-type]  # checked by ExportOptions
        kv_layout=build.kv_layout,
        opset=build.opset,
        io=build.io.to_dict(),
        files=files,
        profiles=build.profiles,
        max_batch=build.max_batch,
        precision_map=build.precision_map,
        tools=build.tools,
        device=engine.device,
        parity=parity,
        build_seconds=round(seconds, 3),
        build_peak_mib=round(engine.peak_mib),
        fingerprint=build.fingerprint,
    )
