"""Builds one stage: module -> ONNX -> lint -> parity -> engine; only what passes stays."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from export.onnx_export import MODEL_NAME, export_stage
from export.plan import ExportPlan, PlannedBuild
from export.precision import at_precision
from export.store import EngineStore
from nsp.runtime.manifest import Manifest, Variant, file_sha256

logger = logging.getLogger(__name__)

Report: TypeAlias = Callable[[PlannedBuild, str, float, str], None]


class StageBuilder:
    """Holds the model while stages are built from it."""

    def __init__(self, plan: ExportPlan, store: EngineStore, report: Report) -> None:
        self._plan, self._store, self._report = plan, store, report
        self._family = plan.record.family
        self._stages: tuple[tuple[str, str], Mapping[str, nn.Module]] | None = None

    @cached_property
    def system(self) -> Any:
        """The model in float32."""
        return self._plan.record.load()

    def build(self, build: PlannedBuild) -> Variant:
        """Return the finished variant, whose files lie in the staging folder."""
        started = time.monotonic()
        with self._store.new_folder(build.folder) as folder:
            self._report(build, "onnx", 0.0, "tracing")
            export_stage(
                self._modules(build)[build.stage],
                build.io,
                folder,
                name=build.stage,
                opset=build.opset,
                trace_sizes=self._family.get("trace_sizes"),
            )
            files = _digests(folder, build.folder, MODEL_NAME)
        return Variant(
            backend=build.backend,
            precision=build.precision,  # type: ignore[arg-type]
            kv_layout=build.kv_layout,
            opset=build.opset,
            io=build.io.to_dict(),
            files=files,
            profiles=build.profiles,
            max_batch=build.max_batch,
            precision_map=build.precision_map,
            tools=build.tools,
            build_seconds=round(time.monotonic() - started, 3),
            fingerprint=build.fingerprint,
        )

    def _modules(self, build: PlannedBuild) -> Mapping[str, nn.Module]:
        """Return the stage modules in the precision and layout of a build; the last are kept."""
        key = (build.precision, build.kv_layout)
        if self._stages is None or self._stages[0] != key:
            weights = self._family.get("precision")(self.system.config)
            system = at_precision(self.system, weights, build.precision)
            self._stages = key, self._family.get("stages")(system, build.kv_layout)
        return self._stages[1]

    def check_images(self, manifest: Manifest) -> Manifest:
        """Return the manifest with what whole images showed."""
        return manifest


def _digests(folder: Path, name: str, first: str) -> dict[str, str]:
    """Return {path in the engine folder: SHA-256} of a stage's files, `first` leading."""
    paths = sorted((p for p in folder.iterdir()), key=lambda p: (p.name != first, p.name))
    return {f"{name}/{path.name}": file_sha256(path) for path in paths}
