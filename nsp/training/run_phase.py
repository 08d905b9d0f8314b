"""One phase of a run: its objective, its training, and the checkpoint with what it has learnt."""

import copy
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from nsp.artifacts.checkpoint import CheckpointRecord
from nsp.artifacts.systems import save_checkpoint
from nsp.family.objective import Objective, TokenCache, TrainingData
from nsp.family.recipe import PhaseConfig, RunConfig, counted
from nsp.family.registry import family
from nsp.family.system import System
from nsp.training.fitting import check_captions
from nsp.training.folder import (
    CHECKPOINT_NAME,
    LORA_NAME,
    TOKENS_NAME,
    newest_model,
    without_places,
)
from nsp.training.judging import (
    forget_verdict,
    has_begun_later,
    judge_phase,
    settled_again,
)
from nsp.training.optimizer import merge_adapters, write_adapters
from nsp.training.parallel import gathered, on_main
from nsp.training.run_pictures import Pictures
from nsp.training.stopping import StopRequest
from nsp.training.tracking import Tracker
from nsp.training.trainer import Phase, share_of

logger = logging.getLogger(__name__)


def run_phase(
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
            made = phase_objective(config, run, folder, accelerator, data, record.load())
            judge_phase(config, run, folder, accelerator, data, made)

        on_main(accelerator, settle_now)
        return True
    system = record.load()

    objective = phase_objective(config, run, folder, accelerator, data, system)
    check_captions(run, config, objective, data)
    phase = Phase(config, objective, accelerator, folder / config.name, run, tracker)
    finished = phase.run(stop)
    steps[config.name] = phase.step
    with phase.averaged():
        weights = gathered(system)

        def save() -> None:
            forget_verdict(folder, config)
            save_model(
                folder / CHECKPOINT_NAME, _plain(system, weights, config, record), run, steps
            )
            if config.lora is not None:
                write_adapters(system, config.lora, folder / config.name / LORA_NAME)

        on_main(accelerator, save)
    if finished:
        on_main(accelerator, lambda: judge_phase(config, run, folder, accelerator, data, objective))
    accelerator.free_memory()
    return finished


def phase_objective(
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
            config.batch_size,
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


def save_model(checkpoint: Path, system: System, config: RunConfig, steps: dict[str, int]) -> None:
    """Write a checkpoint folder."""
    notes = {"steps": steps, "run": without_places(config.to_dict())}
    save_checkpoint(checkpoint, system, notes=notes, sampling=config.sampling)
