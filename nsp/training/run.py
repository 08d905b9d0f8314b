"""A whole training run: data, model, phases in order, a checkpoint folder at the end.

A run folder holds run.json (its RunConfig), start/ (the model before the first step: what a resumed
run must not make anew, such as the prompt tokenizer), one folder per phase, tensorboard/, and
checkpoint/ (the model as it is now). Every phase starts from the last of these two, read anew.
"""

import copy
import itertools
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
from nsp.data.sources import ImageSource
from nsp.errors import CheckpointError, ConfigError
from nsp.families.registry import family
from nsp.files import write_file
from nsp.training.config import FREE_OF_PHASE, PhaseConfig, RunConfig
from nsp.training.objective import Objective
from nsp.training.optimizer import check_targets, merge_adapters
from nsp.training.order import StepSampler
from nsp.training.parallel import gathered
from nsp.training.pictures import Pictures, open_pictures
from nsp.training.stopping import StopRequest
from nsp.training.tracking import Tracker
from nsp.training.trainer import Phase, share_of

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint"
RUN_NAME = "run.json"
START_NAME = "start"
TOKENS_NAME = "tokens.safetensors"
# What a resumed run may change: how long, how it is computed, what is kept of it.
_FREE = (
    "precision",
    "parallel",
    "compile",
    "activation_checkpointing",
    "tracking",
    "data.num_workers",
)


@dataclass(frozen=True)
class RunResult:
    """Where a run left its results."""

    checkpoint: Path
    finished: bool  # False after a request to stop
    is_main_process: bool = True  # the one that tells the user


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

    Ctrl-C or SIGTERM ends the run after the step under way, with a checkpoint of what has been
    learnt; `resume` continues such a run (or any that died) at its last saved step. It may change
    the number of steps, the precision and the devices; other differences from the stored
    configuration raise ConfigError, as does a folder that holds a run when `resume` is not given.
    Every process of a distributed run calls this.
    """
    names = [phase.name for phase in config.phases]
    if last_phase is not None and last_phase not in names:
        raise ConfigError(f"unknown phase {last_phase!r} of this run; known: {', '.join(names)}")
    # Asked for, because processes without a GPU would otherwise not find one another.
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=resolve_precision(config.precision))
    if not accelerator.is_main_process:
        speak_less()
    _check_folder(folder, config, resume=resume)
    set_seed(config.seed)
    data = open_pictures(config.data, skip_bad_files=skip_bad_files)
    _check_batches(config, accelerator, data)
    is_main = accelerator.is_main_process
    with (
        Tracker(config.tracking, is_main_process=is_main) as tracker,
        StopRequest(accelerator) as stop,
    ):
        accelerator.wait_for_everyone()  # nobody writes before everybody has checked
        if is_main:
            _prepare_folder(folder, config, accelerator, data, resume=resume)
        accelerator.wait_for_everyone()
        tracker.start(config.to_dict(), folder)
        logger.info(
            "%s on %s (%s), %d processes: %s, run folder %s",
            *(config.family, accelerator.device, accelerator.mixed_precision),
            *(accelerator.num_processes, data, folder),
        )
        for phase in config.phases:
            if not _run_phase(phase, config, folder, accelerator, stop, tracker, data):
                tracker.close("stopped")
                return RunResult(folder / CHECKPOINT_NAME, False, is_main)
            if phase.name == last_phase:
                break
    return RunResult(folder / CHECKPOINT_NAME, True, is_main)


def speak_less() -> None:
    """Let the first process speak for all, but each name the files that it alone meets."""
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
    record = read_checkpoint(_newest(folder))
    steps = dict(record.notes.get("steps", {}))
    if steps.get(config.name, 0) >= config.steps:
        logger.info("%s: all %d steps are made", config.name, config.steps)
        return True
    system = record.load()

    objective = _objective(config, run, folder, accelerator, data, system)
    phase = Phase(config, objective, accelerator, folder / config.name, run, tracker)
    finished = phase.run(stop)
    steps[config.name] = phase.step
    with phase.averaged():
        weights = gathered(system)
        if accelerator.is_main_process:
            shipped = _plain(system, weights, config, _newest(folder))
            _save(folder / CHECKPOINT_NAME, shipped, run, steps)
    accelerator.wait_for_everyone()
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
    made: Objective = family(run.family).get("objective")(
        config.name,
        config.objective,
        system,
        data.to_train(size, run, share_of(config, accelerator)),
        data.to_validate(size, run),
        Path(run.data.token_cache) if run.data.token_cache else folder / TOKENS_NAME,
    )
    return made


def _newest(folder: Path) -> Path:
    """Return the model a phase of the run in `folder` starts from."""
    checkpoint = folder / CHECKPOINT_NAME
    return checkpoint if is_checkpoint(checkpoint) else folder / START_NAME


def _plain(
    system: torch.nn.Module, weights: dict[str, Any] | None, config: PhaseConfig, start: Path
) -> torch.nn.Module:
    """Return the system as it is saved: not sharded, without adapters."""
    if weights is not None:
        system = read_checkpoint(start).load()
        system.load_state_dict(weights)
    elif config.lora is not None:
        system = copy.deepcopy(system)
        merge_adapters(system)
    return system


def _prepare_folder(
    folder: Path, config: RunConfig, accelerator: Accelerator, data: Pictures, *, resume: bool
) -> None:
    """Make the model a new run starts from and store what the run is."""
    start = folder / START_NAME
    if not (resume and is_checkpoint(start)):
        system = _new_system(config, data.source)
        for phase in config.phases:  # a later one's mistakes must not wait for its turn
            objective = _objective(phase, config, folder, accelerator, data, system)
            if phase.lora is not None:
                check_targets(objective.trained, phase.lora)
        _save(start, system, config, {})
    _begin_again(folder, config, accelerator, data)
    with write_file(folder / RUN_NAME) as partial:  # from here on the folder belongs to this run
        partial.write_text(json.dumps(config.to_dict(), indent=1) + "\n")


def _begin_again(folder: Path, config: RunConfig, accelerator: Accelerator, data: Pictures) -> None:
    """Take a phase whose saved steps were deleted out of checkpoint/: it starts as it once did.

    One that is complete needs them no more, and starts again when its whole folder is gone and no
    later phase was trained on its result.
    """
    record = read_checkpoint(_newest(folder))
    steps = dict(record.notes.get("steps", {}))
    for index, phase in enumerate(config.phases):
        own, made = folder / phase.name, steps.get(phase.name, 0)
        later = any((folder / each.name).exists() for each in config.phases[index + 1 :])
        complete = made >= phase.steps and (own.exists() or later)
        if not made or complete or any((own / "checkpoints").glob("step*")):
            continue
        logger.warning("%s holds no saved steps: %s starts again", own, phase.name)
        system, fresh = record.load(), read_checkpoint(folder / START_NAME).load()
        now, then = (
            _objective(phase, config, folder, accelerator, data, each) for each in (system, fresh)
        )
        now.trained.load_state_dict(then.trained.state_dict())
        del steps[phase.name]
        _save(folder / CHECKPOINT_NAME, system, config, steps)
        record = read_checkpoint(folder / CHECKPOINT_NAME)


def _new_system(config: RunConfig, source: ImageSource | None) -> Any:
    """Return the model before the first step: new, or that of another checkpoint."""
    if config.start_from is None:
        return family(config.family).get("system")(config.model, config.text_encoder, source)
    record = read_checkpoint(Path(config.start_from))
    if record.family.name != config.family:
        raise ConfigError(
            f"{config.start_from} is of family {record.family.name}, this run of {config.family}"
        )
    wanted = record.family.get("config").from_dict(config.model).to_dict()
    for name, have, want in _different("", dict(record.config), wanted):
        if not name.startswith("condition."):  # decided by the text encoder it was trained with
            raise ConfigError(
                f"{config.start_from} has {name} {have!r}, this run's model {want!r}; take the "
                "model from its config.json, or train from new weights"
            )
    return record.load()


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
        for name in (CHECKPOINT_NAME, *(phase.name for phase in config.phases)):
            if (folder / name).exists():
                raise ConfigError(
                    f"{folder} holds {name}/ but no {RUN_NAME}: choose another --output-dir"
                )
        return
    if not path.exists():
        raise CheckpointError(f"{folder} holds no run to resume; leave --resume out to start one")
    stored = stored_run(folder)
    then, now = ([phase.name for phase in run.phases] for run in (stored, config))
    if then != now:
        raise ConfigError(
            f"{path} has the phases {', '.join(then)}, not {', '.join(now)}; leave out what "
            "changes them to continue that run, or start another with --output-dir"
        )
    _check_order(folder, config)
    for name, was, given in differences(stored, config):
        if _is_free(name):
            logger.info("%s: %s is %r from here on, it was %r", folder, name, given, was)
        else:
            raise ConfigError(
                f"{path} says {name} is {was!r}, not {given!r}; leave out what changes it to "
                "continue that run, or start another with --output-dir"
            )


def _check_batches(config: RunConfig, accelerator: Accelerator, data: Pictures) -> None:
    """Raise when the batch of a phase cannot be cut, or exceeds the pictures."""
    for phase in config.phases:
        share = share_of(phase, accelerator)
        if data.source is not None:
            StepSampler(len(data.source), share, start=0, stop=0, seed=0)


def _check_order(folder: Path, config: RunConfig) -> None:
    """Raise when an earlier phase would go on under a later one that was trained on its result."""
    made = read_checkpoint(_newest(folder)).notes.get("steps", {})
    for phase, later in itertools.pairwise(config.phases):
        if 0 < made.get(phase.name, 0) < phase.steps and (folder / later.name).exists():
            raise ConfigError(
                f"{folder}: {later.name} was trained on {phase.name} as it is after "
                f"{made[phase.name]} steps, and {phase.steps} are asked for; delete "
                f"{folder / later.name} to train it again afterwards"
            )


def _is_free(name: str) -> bool:
    """Return whether a resumed run may change the field `name`, such as "phases.0.steps"."""
    parts = name.split(".")
    return (
        name in _FREE or parts[0] in _FREE or (parts[0] == "phases" and parts[2] in FREE_OF_PHASE)
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
