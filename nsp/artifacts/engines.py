"""Opens an engine folder: checks it, chooses a backend and a precision, loads its stages."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nsp.artifacts.engine_choice import choose_backend, choose_variants
from nsp.artifacts.engine_files import HeldFiles, MissingFileError, SpoiltFileError
from nsp.artifacts.manifest import TOKENIZER_DIR, Manifest, read_manifest
from nsp.artifacts.memory_plan import plan_memory
from nsp.artifacts.repair import repair
from nsp.backends.available import Device
from nsp.errors import CheckpointError, EngineError
from nsp.family.contract import AnyFamily
from nsp.files import name_problem
from nsp.stage.backend import Backend
from nsp.stage.io import StageIO

if TYPE_CHECKING:  # class-conditional models need no tokenizer
    from nsp.text.tokenizer import PromptTokenizer

logger = logging.getLogger(__name__)

TEXT_ENCODER = "text_encoder"  # the stage
_MAX_READS = 3  # attempts to read the manifest when its files are replaced meanwhile


@dataclass(frozen=True)
class Engines:
    """An engine folder, loaded."""

    manifest: Manifest
    family: AnyFamily
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
    """Return the loaded engines of `folder`, all from one export, even during a publish.

    `backend`: a name, or "auto" for the first in the registry's order that works here and has every
    stage. `precision`: "fp32", "fp16", "bf16" or "int8"; None is the best one for the device.
    `device`: "cpu" or "cuda"; None is the GPU if one can be used. `num_threads`: None is every
    physical core that this process may use. `verify=False` skips all digests.

    Without the folder of the text encoder, a model that draws without a prompt does only that.

    Raises EngineError for a folder that is missing, damaged, incomplete or for another machine,
    BackendError for a backend that does not work here, ConfigError for an unknown one.
    """
    if problem := name_problem(folder):
        raise EngineError(f"{folder} {problem}")
    manifest = read_manifest(folder, verify=verify)
    for reads in range(1, _MAX_READS + 1):
        try:
            return _open(
                folder,
                manifest,
                backend,
                precision=precision,
                device=device,
                num_threads=num_threads,
                verify=verify,
            )
        except EngineError as error:
            lost: EngineError = error
        old, manifest = manifest, read_manifest(folder, verify=verify)
        replaced = isinstance(lost, MissingFileError) and manifest != old
        if not replaced or reads == _MAX_READS:
            break
        logger.info("%s was replaced while it was read; reading it again", folder)
    raise lost


def _open(
    folder: Path,
    manifest: Manifest,
    backend: str,
    *,
    precision: str | None,
    device: Device | None,
    num_threads: int | None,
    verify: bool,
) -> Engines:
    """Return the engines that one manifest names; MissingFileError if one is missing."""
    chosen, where = choose_backend(folder, manifest, backend, device)
    variants = choose_variants(folder, manifest, chosen, device=where, precision=precision)
    logger.info("%s: %s stages in %s", folder, chosen.name, variants.precision)
    stages, digests = dict(variants.stages), dict(manifest.files)
    if _draws_without_text(folder, manifest):
        logger.warning("%s has no text encoder: it draws only pictures without a prompt", folder)
        stages.pop(TEXT_ENCODER)
        digests = {}
    for variant in stages.values():
        digests |= variant.files
    stages_io = {stage: variant.stage_io for stage, variant in stages.items()}
    try:
        held = HeldFiles(folder, digests)
        if verify:
            held.verify()
        tokenizer = _load_tokenizer(folder, manifest, stages_io)
        if planned := plan_memory(folder, stages):
            logger.info("%s: %s", folder, planned)
        loaded = chosen.load()(
            {stage: folder / next(iter(v.files)) for stage, v in stages.items()},
            stages_io,
            kv_layout=variants.kv_layout,
            device=where,
            num_threads=num_threads,
        )
        loaded.when_loaded(held.release)
    except SpoiltFileError:
        raise
    except EngineError as error:
        raise type(error)(f"{error}; {repair(folder, manifest)}") from error
    batches = [v.max_batch for v in stages.values() if v.max_batch is not None]
    return Engines(
        manifest=manifest,
        family=manifest.family_record,
        backend=loaded,
        precision=variants.precision,
        tokenizer=tokenizer,
        max_batch=min(batches, default=None),
    )


def _draws_without_text(folder: Path, manifest: Manifest) -> bool:
    """Return whether the whole text encoder was removed from a folder that can do without it."""
    needs_it = TEXT_ENCODER not in manifest.stages or (folder / TEXT_ENCODER).exists()
    return manifest.family_record.draws_without_prompt and not needs_it


def _load_tokenizer(
    folder: Path, manifest: Manifest, stages_io: Mapping[str, StageIO]
) -> "PromptTokenizer | None":
    """Return the tokenizer of a model with a text encoder; EngineError if it does not fit."""
    if TEXT_ENCODER not in stages_io:
        return None
    from nsp.text.tokenizer import PromptTokenizer

    places = {name.rpartition("/")[0] for name in manifest.files} or {TOKENIZER_DIR}
    place = folder / min(places)
    try:
        # Other files in this folder were not verified, so they have no effect.
        listed = [name.rpartition("/")[2] for name in manifest.files]
        tokenizer = PromptTokenizer.load(place, listed=listed)
    except CheckpointError as error:
        raise EngineError(str(error)) from error
    length = int(stages_io[TEXT_ENCODER].inputs["token_ids"].words[1])
    if tokenizer.max_tokens != length:
        raise EngineError(
            f"{place} makes prompts of {tokenizer.max_tokens} tokens, but the text encoder takes "
            f"{length}"
        )
    return tokenizer
