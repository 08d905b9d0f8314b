"""The manifest of an engine folder: the engines, their source, machine and measured errors.

engines/
  manifest.json
  tokenizer/8c1f…/                             the prompt tokenizer of a text-conditional model
  step/onnxruntime-fp32-0b2e…/model.onnx       one folder per stage, one folder per variant in it
  step/tensorrt_rtx-fp16-77aa…/engine.plan
  reference/d0d0…/calls.safetensors            recorded calls, for `nsp verify`

Folders of files are named by their content, so a name always means the same bytes: an export adds
folders, then renames one new manifest over the old one. The manifest protects itself with a digest
of its own content. Only files that it lists are read, and their names must have this form.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from nsp.artifacts.repair import repair, repair_unread
from nsp.config import Config
from nsp.errors import ConfigError, EngineError
from nsp.family.contract import AnyFamily
from nsp.family.registry import family as family_record
from nsp.files import inside, read_json, write_file
from nsp.paths import NOTHING, describe, wrong_path
from nsp.sniff import sniff
from nsp.stage.arena import ARENAS
from nsp.stage.io import StageIO

SCHEMA = 3
MANIFEST_NAME = "manifest.json"
TOKENIZER_DIR = "tokenizer"
RECORDED_DIR = "reference"
STAGING_NAME = ".export"  # folder of an export in progress, with a manifest of what is finished

Precision: TypeAlias = Literal["fp32", "fp16", "bf16", "int8"]
# Dtypes of the tensors between stages; with int8 only the products inside them are narrow.
PRECISION_DTYPES: Mapping[str, str] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "float32",
}

CONTENT_DIGITS = 16  # digits of the SHA-256 at the end of a folder's name
_FILE = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_DIGEST = rf"[0-9a-f]{{{CONTENT_DIGITS}}}"
_VARIANT = rf"[a-z_]+-(?:{'|'.join(PRECISION_DTYPES)})-{_DIGEST}"
_DIGEST_KEY = "digest"

logger = logging.getLogger(__name__)


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
    fingerprint: str  # digest of everything that decides its content

    def __post_init__(self) -> None:
        """Check the values that loading and running need."""
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
    """The whole description of an engine folder."""

    schema: int
    family: str
    config: dict[str, Any]  # the family's configuration
    model_hash: str  # SHA-256 over the weights
    source: str  # name of the checkpoint it was exported from; model_hash says which model
    sampling: dict[str, Any] = field(default_factory=dict)  # settings that suit this model
    files: dict[str, str] = field(default_factory=dict)  # shared files (tokenizer) -> SHA-256
    recorded: dict[str, str] = field(default_factory=dict)  # calls for `nsp verify` -> SHA-256
    # Stage -> its StageCosts, read by `costs.read_costs`; none in folders of older exports.
    costs: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, tuple[Variant, ...]]

    def __post_init__(self) -> None:
        """Check the settings."""
        try:
            record = family_record(self.family)
        except ConfigError:  # `check_names` reports it, with the folder
            return
        record.sampling.from_dict(self.sampling)

    @cached_property
    def family_record(self) -> AnyFamily:
        """The family; ConfigError for one this nsp does not know."""
        return family_record(self.family)

    @cached_property
    def model_config(self) -> Any:
        """The family's configuration; ConfigError for one this nsp does not know."""
        return self.family_record.config.from_dict(self.config)

    def check_names(self, folder: Path) -> None:
        """Raise EngineError for a stage or file that no export would write.

        An export moves and removes the files that a manifest names, and a reader opens them, so the
        names must follow from the family and never lead elsewhere. `folder` is for the message.
        """
        try:
            record = self.family_record
            stages = record.stages_io(
                self.model_config, kv_layout=record.kv_layouts[0], dtype="float32"
            )
        except ConfigError as error:
            raise EngineError(
                f"{folder}: this nsp does not know the model in the manifest ({error}); "
                f"install the version that exported it, or {repair(folder, self)}"
            ) from error
        allowed = [(name, rf"{TOKENIZER_DIR}/{_DIGEST}/{_FILE}") for name in self.files]
        allowed += [(name, rf"{RECORDED_DIR}/{_DIGEST}/{_FILE}") for name in self.recorded]
        for stage, variants in self.stages.items():
            if stage not in stages:
                known = ", ".join(stages)
                raise EngineError(
                    f"{folder}: the manifest names a stage {stage!r}, but a model of family "
                    f"{self.family} has {known}; {repair(folder)}"
                )
            form = rf"{re.escape(stage)}/{_VARIANT}/{_FILE}"
            allowed += [(name, form) for variant in variants for name in variant.files]
        for name, form in allowed:
            if re.fullmatch(form, name) is None:
                raise EngineError(
                    f"{folder}: the manifest lists {name}, which no export writes; {repair(folder)}"
                )

    def backends(self) -> tuple[str, ...]:
        """Return the backends for which every stage has a variant."""
        names = {v.backend for variants in self.stages.values() for v in variants}
        return tuple(sorted(n for n in names if all(self.variants(s, n) for s in self.stages)))

    def variants(self, stage: str, backend: str) -> list[Variant]:
        """Return the variants of a stage for a backend."""
        return [v for v in self.stages[stage] if v.backend == backend]


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """Return the manifest of an engine folder.

    Raises EngineError when it is missing, damaged, changed since it was written (unless `verify` is
    off), of another schema, of a model this nsp does not know, or lists files that no export
    writes.
    """
    try:
        path = inside(folder, MANIFEST_NAME)
    except ValueError as error:
        raise EngineError(f"{folder / MANIFEST_NAME} {error}") from None
    try:
        values = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise EngineError(_why_missing(folder)) from None
    except OSError as error:
        raise EngineError(f"{folder / MANIFEST_NAME} cannot be read ({error.strerror})") from error
    except ValueError as error:
        what = sniff(path)
        why = f": it {what.words}; {what.remedy}, or" if what.is_spoilt else f" ({error});"
        raise EngineError(f"{path} is damaged{why} {repair(folder)}") from error
    schema = values.get("schema", SCHEMA)
    if type(schema) is int and schema != SCHEMA:
        raise EngineError(
            f"{path} has schema {schema}, this nsp reads {SCHEMA}; {repair_unread(folder, values)}"
        )
    digest = values.pop(_DIGEST_KEY, None)
    try:
        manifest = Manifest.from_dict(values)
    except ConfigError as error:
        raise EngineError(f"{path} is damaged ({error}); {repair(folder)}") from error
    if digest != _content_digest(values):
        if verify:
            raise EngineError(
                f"{path} is damaged (changed since it was written); {repair(folder, manifest)}"
            )
        logger.warning("%s was changed since it was written; using it without verification", path)
    manifest.check_names(folder)
    return manifest


def _why_missing(folder: Path) -> str:
    """Return the reason why a folder has no manifest, and what to do."""
    if (folder / STAGING_NAME).is_dir():
        return (
            f"{folder}: the export was not finished; {repair(folder)}; it will continue from there"
        )
    found = describe(folder)
    if found.kind not in NOTHING:
        return wrong_path(folder, "engines", found)
    if not folder.exists():
        return f"{folder} does not exist; {repair(folder)}"
    return f"{folder} is not an engine folder: {MANIFEST_NAME} is missing; {repair(folder)}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically."""
    values = manifest.to_dict()
    values[_DIGEST_KEY] = _content_digest(json.loads(json.dumps(values)))
    with write_file(folder / MANIFEST_NAME) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n")


def _content_digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's values, in a canonical form."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def content_name(digests: Mapping[str, str]) -> str:
    """Return the name of a folder of files: a short digest of {name: SHA-256}."""
    text = json.dumps(sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:CONTENT_DIGITS]


def content_folder(stages: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of the folder names that an export of these stages writes."""
    owners = "|".join(map(re.escape, stages))
    return re.compile(rf"(?:{owners})/{_VARIANT}|(?:{TOKENIZER_DIR}|{RECORDED_DIR})/{_DIGEST}")
