"""A whole training run: data, model, phases in order, a checkpoint folder at the end.

A run folder has run.json (its RunConfig), start/ (the model before the first step, with the parts
that a resumed run must not create again, such as the prompt tokenizer), one folder per phase,
tensorboard/, and checkpoint/ (the model as it is now). Every phase reads its first model from
checkpoint/, or from start/ if that is the only one.
"""

import copy
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed

from nsp.artifacts.checkpoint import CheckpointRecord, is_checkpoint, read_checkpoint, write_digests
from nsp.artifacts.systems import save_checkpoint
from nsp.data.report import first
from nsp.errors import CheckpointError, ConfigError
from nsp.family.objective import Objective, TokenCache, TrainingData
from nsp.family.recipe import PhaseConfig, RunConfig, counted
from nsp.family.registry import family
from nsp.family.system import System
from nsp.files import write_file
from nsp.paths import wrong_path
from nsp.text.parts import TextEncoderSettings
from nsp.training.data_order import StepSampler
from nsp.training.data_record import DataRecord
from nsp.training.folder import (
    CHECKPOINT_NAME,
    RUN_NAME,
    START_NAME,
    TOKENS_NAME,
    check_folder,
    check_order,
    differing_values,
    locked,
    newest_model,
    steps_folder,
    without_places,
)
from nsp.training.judging import (
    forget_verdict,
    has_begun_later,
    judge_phase,
    judge_start,
    settled_again,
)
from nsp.training.leftovers import refuse_links, remove_leftovers
from nsp.training.needs import check_classes, check_disk, saved_bytes, warn_of_memory
from nsp.training.optimizer import check_targets, merge_adapters
from nsp.training.other_trackers import OtherTrackers, check_trackers
from nsp.training.parallel import gathered, on_main
from nsp.training.run_pictures import Pictures, open_pictures
from nsp.training.stopping import StopRequest
from nsp.training.tracking import Tracker
from nsp.training.trainer import Phase, share_of
from nsp.training.verdicts import can_rebuild

logger = logging.getLogger(__name__)


_PATIENCE = timedelta(hours=4)


@dataclass(frozen=True)
class RunResult:
    """Where a run left its results."""

    checkpoint: Path
    run: RunConfig  # as it was trained, with all lengths in steps
    finished: bool  # False after a request to stop
    is_main_process: bool = True  # the process that reports to the user


def resolve_precision(requested: str, *, on_cpu: bool) -> str:
    """Return accelerate's name of a precision; "auto" is bf16 on a GPU that has it, else fp32."""
    has_cuda = not on_cpu and torch.cuda.is_available()
    if requested == "auto":
        requested = "bf16" if has_cuda and torch.cuda.is_bf16_supported() else "fp32"
    if requested == "fp16" and not has_cuda:
        raise ConfigError("precision fp16 needs a CUDA device; use fp32 or bf16")
    return "no" if requested == "fp32" else requested


def train(
    config: RunConfig,
    folder: Path,
    *,
    last_phase: str | None = None,
    resume: bool = False,
    skip_bad_files: bool = False,
    device: str | None = None,
    accept_changed_data: bool = False,
) -> RunResult:
    """Train every phase of `config` up to `last_phase` in `folder` and write `folder`/checkpoint.

    Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint of what was learnt;
    `resume` continues such a run (or one that died) at its last saved step. A resumed run may
    change the number of steps, the precision and the devices, and its data may have moved. Lengths
    in epochs become steps when the data are open.
    ConfigError is raised for other differences from the stored configuration, for changed data
    unless `accept_changed_data` is set, and for a folder that has a run if `resume` is not given.
    `device` is "cpu" or "cuda"; None is a GPU if there is one. Every process of a distributed run
    calls this.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "CUDA is not available on this machine; use --device cpu, or omit --device"
        )
    names = [phase.name for phase in config.phases]
    if last_phase is not None and last_phase not in names:
        raise ConfigError(f"unknown phase {last_phase!r} of this run; known: {', '.join(names)}")
    start = Path(config.start_from) if config.start_from is not None and not resume else None
    if start is not None and not is_checkpoint(start):
        raise CheckpointError(wrong_path(start, "--start-from"))
    if config.tracking.log_with:
        check_trackers(config.tracking.log_with)
    # Set explicitly, because processes without a GPU would otherwise not find one another.
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=resolve_precision(config.precision, on_cpu=on_cpu),
        log_with=list(config.tracking.log_with) or None,
        project_dir=folder if config.tracking.log_with else None,
        # Long enough for the first process to tokenize a large set or write a large checkpoint.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    if not accelerator.is_main_process:
        speak_less()
    check_folder(folder, config, resume=resume)
    refuse_links(folder, config)
    set_seed(config.seed)
    _check_place(folder, config, resume=resume)
    data = open_pictures(config.data, skip_bad_files=skip_bad_files)
    if (classes := data.named_by_class) and _takes_prompts(config):
        logger.info("captions: the names of %d class folders (%s)", len(classes), first(classes))
    config = config.in_steps(None if data.source is None else len(data.source))
    if resume:
        check_order(folder, config)
    record = DataRecord(folder, data, resume=resume)
    record.check(accept_changed_data=accept_changed_data)
    _check_batches(config, accelerator, data)
    is_main = accelerator.is_main_process
    with (
        Tracker(config.tracking, is_main_process=is_main) as tracker,
        StopRequest(accelerator) as stop,
        ExitStack() as held,  # the folder's lock, until the run ends
    ):

        def begin() -> None:
            held.enter_context(locked(folder))
            refuse_links(folder, config)
            remove_leftovers(folder, config)
            phases = config.phases[: names.index(last_phase or names[-1]) + 1]
            _prepare_folder(folder, config, phases, accelerator, data, record, resume=resume)

        accelerator.wait_for_everyone()  # no process writes before all have checked
        on_main(accelerator, begin)
        others = [OtherTrackers(accelerator, config)] if config.tracking.log_with else []
        tracker.start(config.to_dict(), folder, others)
        logger.info(
            "family %s on %s in %s, number of processes: %d; data: %s; run folder: %s",
            *(config.family, accelerator.device, accelerator.mixed_precision.replace("no", "fp32")),
            *(accelerator.num_processes, data, folder),
        )
        for phase in config.phases:
            if not _run_phase(phase, config, folder, accelerator, stop, tracker, data):
                tracker.close("stopped")
                return RunResult(folder / CHECKPOINT_NAME, config, False, is_main)
            if phase.name == last_phase:
                break
    return RunResult(folder / CHECKPOINT_NAME, config, True, is_main)


def _takes_prompts(config: RunConfig) -> bool:
    owner = family(config.family)
    return owner.condition(owner.config.from_dict(config.model)) == "prompt"


def speak_less() -> None:
    """Silence a process that is not the first, except for warnings about the files it reads."""
    logging.getLogger("nsp").setLevel(logging.ERROR)
    logging.getLogger("nsp.data.stream").setLevel(logging.WARNING)


def _run_phase(
    config: PhaseConfig,
    run: RunConfig,
    folder: Path,
    accelerator: Accelerator,
    stop: StopRequest,
    tracker: Tracker,
    data: Pictures,
) -> bool:
    """Train one phase, starting from the newest checkpoint; return whether all steps are made."""
    record = newest_model(folder)
    steps = dict(record.notes.get("steps", {}))
    if steps.get(config.name, 0) >= counted(config.steps):
        logger.info("%s: all %d steps are made", config.name, config.steps)

        def settle_now() -> None:
            if has_begun_later(folder, config, run) or settled_again(folder, config, run):
                return
            made = _objective(config, run, folder, accelerator, data, record.load())
            judge_phase(config, run, folder, accelerator, data, made)

        on_main(accelerator, settle_now)
        return True
    system = record.load()

    objective = _objective(config, run, folder, accelerator, data, system)
    _check_captions(run, config, objective, data)
    phase = Phase(config, objective, accelerator, folder / config.name, run, tracker)
    finished = phase.run(stop)
    steps[config.name] = phase.step
    with phase.averaged():
        weights = gathered(system)

        def save() -> None:
            forget_verdict(folder, config)
            _save(folder / CHECKPOINT_NAME, _plain(system, weights, config, record), run, steps)

        on_main(accelerator, save)
    if finished:
        on_main(accelerator, lambda: judge_phase(config, run, folder, accelerator, data, objective))
    accelerator.free_memory()
    return finished


def _objective(
    config: PhaseConfig,
    run: RunConfig,
    folder: Path,
    accelerator: Accelerator,
    data: Pictures,
    system: Any,
) -> Objective:
    """Return the objective of a phase over the modules of `system`."""
    size = system.config.image_size_px
    made: Objective = family(run.family).learner.objective(
        config.name,
        config.objective,
        system,
        TrainingData(
            data.to_train(size, run, share_of(config, accelerator)),
            data.to_validate(size, run),
            TokenCache(Path(run.data.token_cache), is_given=True)
            if run.data.token_cache
            else TokenCache(folder / TOKENS_NAME),
        ),
    )
    return made


def _plain(
    system: System,
    weights: dict[str, Any] | None,
    config: PhaseConfig,
    record: CheckpointRecord,
) -> System:
    """Return the system in the form that is saved: not sharded, without adapters."""
    if weights is not None:
        system = record.load()
        system.load_state_dict(weights)
    elif config.lora is not None:
        system = copy.deepcopy(system)
        merge_adapters(system)
    return system


def _prepare_folder(
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
            objective = _objective(phase, config, folder, accelerator, data, system)
            objectives.append(objective)
            saved += saved_bytes(objective, phase) if phase in phases else 0
            if phase in phases:
                _check_captions(config, phase, objective, data)
            if phase.lora is not None:
                check_targets(objective.trained, phase.lora)
        check_disk(saved, Path(config.checkpoint_dir or folder))
        warn_of_memory(
            config,
            phases,
            system,
            lambda phase, empty: _objective(phase, config, folder, accelerator, data, empty),
            batch_size_of=lambda phase: share_of(phase, accelerator).micro_batch_size,
            device=accelerator.device,
        )
        if config.start_from is not None and can_rebuild(family(config.family)):
            judge_start(config, folder, accelerator, data, system, objectives[0])
        _save(start, system, config, {})
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
            _objective(phase, config, folder, accelerator, data, each) for each in (system, fresh)
        )
        now.trained.load_state_dict(then.trained.state_dict())
        del steps[phase.name]
        _save(folder / CHECKPOINT_NAME, system, config, steps)
        record = read_checkpoint(folder / CHECKPOINT_NAME)


def _new_system(config: RunConfig, data: Pictures) -> Any:
    """Return the model before the first step: new, or that of another checkpoint.

    A new model has the classes of the pictures.
    """
    if config.start_from is None:
        owner = family(config.family)
        model = owner.with_classes(owner.config.from_dict(config.model), data.train.class_names)
        settings = TextEncoderSettings.from_dict(config.text_encoder)
        return owner.learner.new_system(model, settings, data.source)
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


def _save(checkpoint: Path, system: System, config: RunConfig, steps: dict[str, int]) -> None:
    """Write a checkpoint folder."""
    notes = {"steps": steps, "run": without_places(config.to_dict())}
    save_checkpoint(checkpoint, system, notes=notes, sampling=config.sampling)


def _check_place(folder: Path, config: RunConfig, *, resume: bool) -> None:
    """Raise ConfigError for missing data, and for a run folder inside the data folder."""
    source = config.data.source
    if config.data.stream or source == "emoji" or source.startswith("hf:"):
        return
    if resume and not Path(source).exists():
        raise ConfigError(
            f"{folder}: its data {source} does not exist (relative to {Path.cwd()}); if it "
            "moved, give its new path with --data"
        )
    if folder.resolve().is_relative_to(Path(source).resolve()):
        raise ConfigError(
            f"{folder} is inside the data folder {source}, so the run's files would count as "
            "training data; choose another --output-dir"
        )


def _check_captions(
    config: RunConfig, phase: PhaseConfig, objective: Objective, data: Pictures
) -> None:
    """Raise ConfigError when a phase needs captions that the pictures do not have."""
    if objective.needs_captions and data.without_captions is not None:
        names = [each.name for each in config.phases]
        before = names[: names.index(phase.name)]
        stop = f", or end the run before it with --phase {before[-1]}" if before else ""
        raise ConfigError(
            f"phase {phase.name} needs captions, but {data.without_captions} none; add them "
            f"(for each picture, a .txt file of the same name next to it){stop}"
        )


def _check_batches(config: RunConfig, accelerator: Accelerator, data: Pictures) -> None:
    """Raise when the batch of a phase cannot be cut, or is larger than the data set."""
    for phase in config.phases:
        share = share_of(phase, accelerator)
        if data.source is not None:
            StepSampler(len(data.source), share, start=0, stop=0, seed=0)
