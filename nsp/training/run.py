"""A whole training run: data, model, phases in order, a checkpoint folder at the end.

A run folder holds run.json (its RunConfig), start/ (the model before the first step: what a resumed
run must not make anew, such as the prompt tokenizer), one folder per phase, and checkpoint/.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from nsp.checkpoint import is_checkpoint, read_checkpoint
from nsp.config import Config
from nsp.data.dataset import ImageDataset
from nsp.data.sources import ImageSource, open_source
from nsp.errors import CheckpointError, ConfigError
from nsp.families.registry import family
from nsp.files import write_file
from nsp.training.config import RunConfig
from nsp.training.trainer import Phase, shipped_weights

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint"
RUN_NAME = "run.json"
START_NAME = "start"


@dataclass(frozen=True)
class RunResult:
    """Where a run left its results."""

    checkpoint: Path
    finished: bool  # False after Ctrl-C


def resolve_precision(requested: str) -> str:
    """Return accelerate's word for a precision; "auto" is bf16 on a GPU that has it, else fp32."""
    if requested == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        requested = "bf16" if has_bf16 else "fp32"
    if requested == "fp16" and not torch.cuda.is_available():
        raise ConfigError("precision fp16 needs a CUDA device; use fp32 or bf16")
    return "no" if requested == "fp32" else requested


def train(
    config: RunConfig,
    folder: Path,
    *,
    last_phase: str | None = None,
    resume: bool = False,
    skip_bad_files: bool = False,
) -> RunResult:
    """Train every phase of `config` up to `last_phase` in `folder` and write `folder`/checkpoint.

    Ctrl-C ends the run early with a checkpoint of what has been learnt; `resume` continues such a
    run (or any that died) at its last saved step, where only steps and precision may differ from
    the stored configuration. Raises ConfigError for other differences, and when `folder` holds a
    run and `resume` is not given.
    """
    names = [phase.name for phase in config.phases]
    if last_phase is not None and last_phase not in names:
        raise ConfigError(f"unknown phase {last_phase!r} of this run; known: {', '.join(names)}")
    accelerator = Accelerator(mixed_precision=resolve_precision(config.precision))
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes: this version trains in one; start one process"
        )
    _check_folder(folder, config, resume=resume)
    set_seed(config.seed)
    record = family(config.family)
    source = open_source(config.data.source, split="train", skip_bad_files=skip_bad_files)
    system = _system(folder, config, source, resume=resume).to(accelerator.device)
    data = ImageDataset(
        source,
        system.config.image_size_px,
        train=True,
        crop=config.data.crop,
        flip=config.data.flip,
        seed=config.seed,
    )
    with write_file(folder / RUN_NAME) as partial:  # from here on the folder belongs to this run
        partial.write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    logger.info(
        "%s on %s (%s): %d pictures, run folder %s",
        config.family,
        accelerator.device,
        accelerator.mixed_precision,
        len(data),
        folder,
    )
    finished, steps = True, {}
    for phase_config in config.phases:
        objective = record.get("objective")(phase_config.name, phase_config.objective, system, data)
        phase = Phase(
            phase_config,
            objective,
            accelerator,
            folder / phase_config.name,
            config.seed,
            config.data.num_workers,
        )
        if not phase.done:
            try:
                phase.run()
            except KeyboardInterrupt:
                finished = False
        steps[phase_config.name] = phase.step
        with shipped_weights(phase):
            _save(folder / CHECKPOINT_NAME, system, config, steps)
        if phase.done:
            phase.adopt_average()
        if not finished or phase_config.name == last_phase:
            break
    return RunResult(folder / CHECKPOINT_NAME, finished)


def _system(folder: Path, config: RunConfig, source: ImageSource, *, resume: bool) -> Any:
    """Return the model a run starts from: a resumed run's own, else a new one, kept in `folder`.

    Made again, it would follow the captions and the text encoder's folder as they are by then.
    """
    start = folder / START_NAME
    if resume and is_checkpoint(start):
        return read_checkpoint(start).load()
    system = family(config.family).get("system")(config.model, config.text_encoder, source)
    _save(start, system, config, {})
    return system


def _save(
    checkpoint: Path, system: torch.nn.Module, config: RunConfig, steps: dict[str, int]
) -> None:
    """Write a checkpoint folder."""
    notes = {"steps": steps, "run": config.to_dict()}
    family(config.family).get("save_checkpoint")(
        checkpoint, system, notes=notes, sampling=config.sampling
    )


def _check_folder(folder: Path, config: RunConfig, *, resume: bool) -> None:
    """Raise when `folder` does (not) hold a run, or one that `config` does not continue."""
    path = folder / RUN_NAME
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; choose another --output-dir")
    if path.exists() and not resume:
        raise ConfigError(
            f"{folder} holds a run already; continue it with --resume or choose --output-dir"
        )
    if not resume:
        return
    if not path.exists():
        raise CheckpointError(f"{folder} holds no run to resume; leave --resume out to start one")
    for name, stored, given in differences(stored_run(folder), config):
        if name == "precision" or name.endswith(".steps"):
            logger.info("%s: %s is %r from here on, it was %r", folder, name, given, stored)
        else:
            raise ConfigError(
                f"{path} says {name} is {stored!r}, not {given!r}; leave out what changes it to "
                "continue that run, or start another with --output-dir"
            )


def stored_run(folder: Path) -> RunConfig:
    """Return the configuration of the run in `folder`; raise CheckpointError when it is damaged."""
    path = folder / RUN_NAME
    try:
        return RunConfig.from_dict(json.loads(path.read_text()))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); start another run with --output-dir"
        ) from error


def differences(stored: Config, given: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name and both values of everything two configurations differ in."""
    yield from _different("", stored.to_dict(), given.to_dict())


def _different(name: str, stored: Any, given: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*stored, *(key for key in given if key not in stored)]:
            yield from _different(f"{name}.{key}", stored.get(key), given.get(key))
    elif isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        for index, pair in enumerate(zip(stored, given, strict=True)):
            yield from _different(f"{name}.{index}", *pair)
    elif stored != given:
        yield name.removeprefix("."), stored, given
