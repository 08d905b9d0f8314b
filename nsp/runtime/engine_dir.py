"""Opens an engine folder: checks it, chooses a backend and a precision, loads its stages."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.errors import CheckpointError, ConfigError, EngineError
from nsp.families.registry import Family, family
from nsp.runtime.backends.base import Backend
from nsp.runtime.backends.registry import Device
from nsp.runtime.cores import usable_cores
from nsp.runtime.engine_choice import choose_backend, choose_variants
from nsp.runtime.io import StageIO
from nsp.runtime.manifest import TOKENIZER_DIR, Manifest, check_files, read_manifest
from nsp.runtime.memory_plan import plan_memory
from nsp.runtime.repair import repair

if TYPE_CHECKING:  # class-conditional models need no tokenizer
    from nsp.text.tokenizer import PromptTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engines:
    """An engine folder, loaded."""

    manifest: Manifest
    family: Family
    backend: Backend
    precision: str
    tokenizer: "PromptTokenizer | None"
    max_batch: int | None  # images per batch; None: any


def open_engine_dir(
    folder: Path,
    backend: str = "auto",
    *,
    precision: str | None = None,
    device: Device | None = None,
    num_threads: int | None = None,
    verify: bool = True,
) -> Engines:
    """Return the loaded engines of `folder`.

    `backend`: a name, or "auto" for the first in the registry's order that works here and has every
    stage. `precision`: "fp32", "fp16", "bf16" or "int8"; None is what suits the device. `device`:
    "cpu" or "cuda"; None is the GPU where one can be used. `num_threads`: None is every physical
    core this process may use. `verify=False` skips the SHA-256 of the files.

    Raises EngineError for a folder that is missing, damaged, incomplete or for another machine,
    BackendError for a backend that does not work here, ConfigError for an unknown one.
    """
    manifest = read_manifest(folder)
    record, config = _model(folder, manifest)
    chosen, where = choose_backend(folder, manifest, backend, device)
    variants = choose_variants(
        folder, manifest, chosen, family=record, config=config, device=where, precision=precision
    )
    logger.info("%s: %s stages in %s", folder, chosen.name, variants.precision)
    files = dict(manifest.files)
    for variant in variants.stages.values():
        files |= variant.files
    stages_io = {stage: variant.stage_io for stage, variant in variants.stages.items()}
    try:
        if verify:
            _verify(folder, files)
        tokenizer = _load_tokenizer(folder, stages_io)
        if planned := plan_memory(folder, variants.stages):
            logger.info("%s: %s", folder, planned)
        loaded = chosen.load()(
            {stage: folder / next(iter(v.files)) for stage, v in variants.stages.items()},
            stages_io,
            kv_layout=variants.kv_layout,
            device=where,
            num_threads=num_threads,
        )
    except EngineError as error:
        raise EngineError(f"{error}; {repair(folder, manifest)}") from error
    batches = [v.max_batch for v in variants.stages.values() if v.max_batch is not None]
    return Engines(
        manifest=manifest,
        family=record,
        backend=loaded,
        precision=variants.precision,
        tokenizer=tokenizer,
        max_batch=min(batches, default=None),
    )


def _model(folder: Path, manifest: Manifest) -> tuple[Family, Any]:
    """Return the family's record and the model's configuration."""
    try:
        record = family(manifest.family)
        return record, record.get("config").from_dict(manifest.config)
    except ConfigError as error:
        raise EngineError(
            f"{folder}: this nsp does not know the model in the manifest ({error}); "
            f"install the version that exported it, or {repair(folder, manifest)}"
        ) from error


def _verify(folder: Path, files: Mapping[str, str]) -> None:
    """Raise EngineError naming the first file that is missing or not what was exported.

    Every byte is read: 40 MB take 30 ms, and about 1 s per 1.5 GB and core.
    """
    start = time.perf_counter()
    with ThreadPoolExecutor(usable_cores()) as pool:  # hashing releases the interpreter lock
        for _ in pool.map(lambda name: check_files(folder, {name: files[name]}), files):
            pass
    seconds = time.perf_counter() - start
    logger.info("%s: %d files verified in %.2f s", folder, len(files), seconds)


def _load_tokenizer(folder: Path, stages_io: Mapping[str, StageIO]) -> "PromptTokenizer | None":
    """Return the tokenizer of a model with a text encoder; EngineError when it does not fit."""
    if "text_encoder" not in stages_io:
        return None
    from nsp.text.tokenizer import PromptTokenizer

    try:
        tokenizer = PromptTokenizer.load(folder / TOKENIZER_DIR)
    except CheckpointError as error:
        raise EngineError(str(error)) from error
    length = int(stages_io["text_encoder"].inputs["token_ids"].words[1])
    if tokenizer.max_tokens != length:
        raise EngineError(
            f"{folder / TOKENIZER_DIR} makes prompts of {tokenizer.max_tokens} tokens, the text "
            f"encoder takes {length}"
        )
    return tokenizer
