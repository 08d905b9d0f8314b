"""A whole training run: data, model, phases in order, a checkpoint folder at the end.

A run folder has run.json (its RunConfig), start/ (the model before the first step, with the parts
that a resumed run must not create again, such as the prompt tokenizer), one folder per phase,
tensorboard/, and checkpoint/ (the model as it is now). Every phase reads its first model from
checkpoint/, or from start/ if that is the only one.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed

from nsp.artifacts.checkpoint import is_checkpoint
from nsp.data.report import first
from nsp.errors import CheckpointError, ConfigError
from nsp.family.recipe import RunConfig
from nsp.family.registry import family
from nsp.paths import wrong_path
from nsp.training.data_record import DataRecord
from nsp.training.fitting import check_batches, check_place, check_pretrained
from nsp.training.folder import (
    CHECKPOINT_NAME,
    check_folder,
    check_order,
    locked,
)
from nsp.training.leftovers import refuse_links, remove_failed_start, remove_leftovers
from nsp.training.other_trackers import OtherTrackers, check_trackers
from nsp.training.parallel import on_main
from nsp.training.run_phase import run_phase
from nsp.training.run_pictures import open_pictures
from nsp.training.run_start import prepare_folder
from nsp.training.stopping import StopRequest
from nsp.training.tracking import Tracker

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
    unless `accept_changed_data` is set, and for a folder that has a run if `resume` is not given; a
    run without any saved step is replaced instead.
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
    if not resume:
        check_pretrained(config)
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
    if config.compile is None:
        config = replace(config, compile=accelerator.device.type == "cuda")
    check_folder(folder, config, resume=resume)
    refuse_links(folder, config)
    set_seed(config.seed)
    check_place(folder, config, resume=resume)
    data = open_pictures(config.data, skip_bad_files=skip_bad_files)
    if (classes := data.named_by_class) and _takes_prompts(config):
        logger.info("captions: the names of %d class folders (%s)", len(classes), first(classes))
    config = config.in_steps(None if data.source is None else len(data.source))
    if resume:
        check_order(folder, config)
    record = DataRecord(folder, data, resume=resume)
    record.check(accept_changed_data=accept_changed_data)
    check_batches(config, accelerator, data)
    is_main = accelerator.is_main_process
    with (
        Tracker(config.tracking, is_main_process=is_main) as tracker,
        StopRequest(accelerator) as stop,
        ExitStack() as held,  # the folder's lock, until the run ends
    ):

        def begin() -> None:
            held.enter_context(locked(folder))
            refuse_links(folder, config)
            if not resume:
                check_folder(folder, config, resume=False)  # another process may have begun a run
                remove_failed_start(folder)
            remove_leftovers(folder, config)
            phases = config.phases[: names.index(last_phase or names[-1]) + 1]
            prepare_folder(folder, config, phases, accelerator, data, record, resume=resume)

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
            if not run_phase(phase, config, folder, accelerator, stop, tracker, data):
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
