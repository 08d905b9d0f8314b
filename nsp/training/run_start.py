"""The start of a run: the model before the first step, checked, and the folder that keeps it."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from nsp.artifacts.checkpoint import is_checkpoint, read_checkpoint, write_digests
from nsp.errors import ConfigError
from nsp.family.recipe import PhaseConfig, RunConfig, counted
from nsp.family.registry import family
from nsp.files import write_file
from nsp.text.parts import TextEncoderSettings
from nsp.training.data_record import DataRecord
from nsp.training.fitting import check_captions, check_codes
from nsp.training.folder import (
    CHECKPOINT_NAME,
    RUN_NAME,
    START_NAME,
    differing_values,
    newest_model,
    steps_folder,
)
from nsp.training.judging import judge_start
from nsp.training.needs import (
    check_classes,
    check_disk,
    saved_bytes,
    warn_of_memory,
)
from nsp.training.optimizer import check_targets
from nsp.training.run_phase import phase_objective, save_model
from nsp.training.run_pictures import Pictures
from nsp.training.trainer import share_of
from nsp.training.verdicts import can_rebuild

logger = logging.getLogger(__name__)


def prepare_folder(
    folder: Path,
    config: RunConfig,
    phases: Sequence[PhaseConfig],
    accelerator: Accelerator,
    data: Pictures,
    record: DataRecord,
    *,
    resume: bool,
) -> None:
    """Create the model that a new run starts from, and store the run's configuration."""
    start = folder / START_NAME
    if not (resume and is_checkpoint(start)):
        system = _new_system(config, data)
        check_classes(system.config, family(config.family).condition(system.config), data.source)
        saved, objectives = 0, []
        for phase in config.phases:  # report mistakes of later phases now, not when they begin
            objective = phase_objective(phase, config, folder, accelerator, data, system)
            objectives.append(objective)
            if data.are_codes:
                check_codes(config, phase, objective)
            saved += saved_bytes(objective, phase) if phase in phases else 0
            if phase in phases:
                check_captions(config, phase, objective, data)
            if phase.lora is not None:
                check_targets(objective.trained, phase.lora)
        check_disk(saved, Path(config.checkpoint_dir or folder))
        warn_of_memory(
            config,
            phases,
            system,
            lambda phase, empty: phase_objective(phase, config, folder, accelerator, data, empty),
            batch_size_of=lambda phase: share_of(phase, accelerator).micro_batch_size,
            device=accelerator.device,
        )
        if config.start_from is not None and can_rebuild(family(config.family)):
            judge_start(config, folder, accelerator, data, system, objectives[0])
        save_model(start, system, config, {})
    _begin_again(folder, config, accelerator, data)
    newest = newest_model(folder)
    for model in (newest, read_checkpoint(start)):
        if not model.files:  # the run began before checkpoints had digests
            write_digests(model.folder)
    record.write(newest.notes.get("steps", {}))
    with write_file(folder / RUN_NAME) as partial:  # from now on the folder belongs to this run
        partial.write_text(json.dumps(config.to_dict(), indent=1) + "\n")


def _begin_again(folder: Path, config: RunConfig, accelerator: Accelerator, data: Pictures) -> None:
    """Reset a phase in checkpoint/ whose saved steps were deleted: it starts from the beginning.

    A complete phase does not need them any more; it starts again only when its whole folder is
    gone and no later phase was trained on its result.
    """
    record = newest_model(folder)
    steps = dict(record.notes.get("steps", {}))
    for index, phase in enumerate(config.phases):
        own, made = folder / phase.name, steps.get(phase.name, 0)
        later = any((folder / each.name).exists() for each in config.phases[index + 1 :])
        complete = made >= counted(phase.steps) and (own.exists() or later)
        if not made or complete or any(steps_folder(config, own).glob("step*")):
            continue
        logger.warning("%s has no saved steps: %s starts again", own, phase.name)
        system, fresh = record.load(), read_checkpoint(folder / START_NAME).load()
        now, then = (
            phase_objective(phase, config, folder, accelerator, data, each)
            for each in (system, fresh)
        )
        now.trained.load_state_dict(then.trained.state_dict())
        del steps[phase.name]
        save_model(folder / CHECKPOINT_NAME, system, config, steps)
        record = read_checkpoint(folder / CHECKPOINT_NAME)


def _new_system(config: RunConfig, data: Pictures) -> Any:
    """Return the model before the first step: new, or that of another checkpoint.

    A new model has the classes of the pictures. Raises ConfigError for the folder of a text encoder
    that no part of the model would come from.
    """
    settings = TextEncoderSettings.from_dict(config.text_encoder)
    if config.start_from is None:
        owner = family(config.family)
        model = owner.with_classes(owner.config.from_dict(config.model), data.train.class_names)
        if settings.folder is not None and owner.condition(model) != "prompt":
            raise ConfigError(
                f"text encoder {settings.folder}: this model reads no prompts; omit --text-encoder"
            )
        return owner.learner.new_system(model, settings, data.source)
    if settings.folder is not None:
        raise ConfigError(
            f"the text encoder would come from {settings.folder} and from {config.start_from}; "
            "give only one of --text-encoder and --start-from"
        )
    record = read_checkpoint(Path(config.start_from))
    if record.family.name != config.family:
        raise ConfigError(
            f"{config.start_from} is of family {record.family.name}, but this run is of "
            f"{config.family}"
        )
    trained = record.family.config.from_dict(record.config)
    wanted = record.family.adopt(record.family.config.from_dict(config.model), trained)
    for name, have, want in differing_values(trained.to_dict(), wanted.to_dict()):
        raise ConfigError(
            f"{config.start_from} has {name} {have!r}, but this run's model has {want!r}; use the "
            "model of its config.json, or train from new weights"
        )
    return record.load()
