"""The manifest of an engine folder: what was built, from what, for what, and how well it matches.

engines/
  manifest.json
  tokenizer/                              the prompt tokenizer of a text-conditional model
  step/onnxruntime-fp32/model.onnx        one folder per stage, one folder per variant in it
  step/tensorrt_rtx-fp16/engine.plan
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

from nsp.config import Config
from nsp.errors import ConfigError, EngineError
from nsp.files import read_json, write_file
from nsp.runtime.io import StageIO
from nsp.runtime.kv_arena import ARENAS
from nsp.runtime.repair import repair
from nsp.runtime.sampling import SamplingConfig

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_DIR = "tokenizer"
STAGING_NAME = ".export"  # folder of an export in progress, with a manifest of what is finished

Precision: TypeAlias = Literal["fp32", "fp16", "bf16", "int8"]
# Dtypes of the tensors between stages; with int8 only the products inside them are narrow.
PRECISION_DTYPES: Mapping[str, str] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "float32",
}


@dataclass(frozen=True, kw_only=True)
class Variant(Config):
    """One stage compiled for one backend in one precision."""

    backend: str  # "onnxruntime", "tensorrt_rtx" or "tensorrt"
    precision: Precision
    kv_layout: str  # layout of the cache its `step` was exported with
    opset: int
    io: dict[str, Any]  # StageIO.to_dict()
    files: dict[str, str]  # path in the engine folder -> SHA-256; the first is the one to load
    profiles: tuple[dict[str, Any], ...] = ()  # {input: [min, opt, max]} each; static engines
    max_batch: int | None = None  # images per batch; None: any
    precision_map: dict[str, str] = field(default_factory=dict)  # module or tensor -> dtype kept
    tools: dict[str, str] = field(default_factory=dict)  # package -> version that built it
    device: dict[str, str] = field(default_factory=dict)  # what it was built for
    parity: dict[str, Any] = field(default_factory=dict)  # measured at export
    build_seconds: float = 0.0
    build_peak_mib: float = 0.0  # memory of the compiler's process; 0 where nothing is compiled
    fingerprint: str  # of everything that decides its content

    def __post_init__(self) -> None:
        """Check what loading and running rely on."""
        if self.kv_layout not in ARENAS:
            raise ConfigError(f"kv_layout {self.kv_layout!r} is not one of {', '.join(ARENAS)}")
        if self.max_batch is not None and self.max_batch < 1:
            raise ConfigError(
                f"max_batch must be at least 1, or null for any; got {self.max_batch}"
            )
        try:
            StageIO.from_dict(self.io)
        except ConfigError as error:
            raise ConfigError(f"io: {error}") from error

    @property
    def stage_io(self) -> StageIO:
        """The declaration it was built from."""
        return StageIO.from_dict(self.io)


@dataclass(frozen=True, kw_only=True)
class Manifest(Config):
    """Everything an engine folder says about itself."""

    schema: int
    family: str
    config: dict[str, Any]  # the family's configuration
    model_hash: str  # SHA-256 over the weights
    source: str  # checkpoint folder it was exported from, relative to the engine folder
    sampling: dict[str, Any] = field(default_factory=dict)  # settings that suit this model
    files: dict[str, str] = field(default_factory=dict)  # shared files (tokenizer) -> SHA-256
    stages: dict[str, tuple[Variant, ...]]

    def __post_init__(self) -> None:
        """Check the settings."""
        SamplingConfig.from_dict(self.sampling)

    def backends(self) -> tuple[str, ...]:
        """Return the backends for which every stage has a variant."""
        names = {v.backend for variants in self.stages.values() for v in variants}
        return tuple(sorted(n for n in names if all(self.variants(s, n) for s in self.stages)))

    def variants(self, stage: str, backend: str) -> list[Variant]:
        """Return the variants of a stage for a backend."""
        return [v for v in self.stages[stage] if v.backend == backend]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of an engine folder.

    Raises EngineError when it is missing, damaged or of another schema.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if (folder / STAGING_NAME).is_dir():
            raise EngineError(
                f"{folder}: the export was not finished; {repair(folder)}; it goes on from there"
            )
        raise EngineError(
            f"{folder} is no engine folder: {MANIFEST_NAME} is missing; {repair(folder)}"
        )
    try:
        values = read_json(path)
        schema = values.get("schema", SCHEMA)
        if type(schema) is int and schema != SCHEMA:
            raise EngineError(
                f"{path} has schema {schema}, this nsp reads {SCHEMA}; {repair(folder)}"
            )
        manifest = Manifest.from_dict(values)
    except (ValueError, ConfigError) as error:
        raise EngineError(f"{path} is damaged ({error}); {repair(folder)}") from error
    _check_names(folder, manifest)
    return manifest


def _check_names(folder: Path, manifest: Manifest) -> None:
    """Raise EngineError for a file that is not in its stage's folder: no export writes that.

    An export moves and removes what a manifest names, so a name must never lead outside.
    """
    listed = [(TOKENIZER_DIR, name) for name in manifest.files]
    for stage, variants in manifest.stages.items():
        listed += [(stage, name) for variant in variants for name in variant.files]
    for owner, name in listed:
        parts = PurePosixPath(name).parts
        if len(parts) < 2 or parts[0] != owner or ".." in parts:
            raise EngineError(f"{folder}: the manifest lists {name}, outside it; {repair(folder)}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json in one move."""
    with write_file(folder / MANIFEST_NAME) as partial:
        partial.write_text(json.dumps(manifest.to_dict(), indent=1) + "\n")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Raise EngineError naming the first file that is missing or not of its recorded SHA-256."""
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise EngineError(f"{path} is missing though the manifest lists it")
        if file_sha256(path) != digest:
            raise EngineError(f"{path} differs from what was exported (SHA-256)")
