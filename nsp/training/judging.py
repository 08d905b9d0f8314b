"""When a run is judged: before it starts from trained weights, and after every phase."""

import logging
from pathlib import Path

from accelerate import Accelerator

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.family.objective import Objective
from nsp.family.recipe import PhaseConfig, RunConfig
from nsp.family.registry import family
from nsp.family.system import System
from nsp.files import read_json
from nsp.training.folder import CHECKPOINT_NAME
from nsp.training.run_pictures import Pictures
from nsp.training.trainer import share_of
from nsp.training.verdicts import (
    SHEET_NAME,
    VERDICT_NAME,
    Verdict,
    can_rebuild,
    judge_generator,
    judge_tokenizer,
    settle,
)

logger = logging.getLogger(__name__)


def judge_start(
    config: RunConfig,
    folder: Path,
    accelerator: Accelerator,
    data: Pictures,
    system: System,
    first: Objective,
) -> None:
    """Say how well the image tokenizer that a run starts with rebuilds the run's pictures.

    If it is not good enough, the run does not begin, unless its first phase trains all of it.
    """
    owner = family(config.family)
    share = share_of(config.phases[0], accelerator)
    scratch = next(iter(owner.recipes), None)
    with_preset = "without --start-from" if scratch is None else f"with --preset {scratch}"
    verdict = judge_tokenizer(
        owner,
        system,
        data.to_judge(system.config.image_size_px, config, share),
        seed=config.seed,
        advice=f"train one on these pictures {with_preset}",
        sheet=folder / SHEET_NAME,
    )
    name = f"the image tokenizer of {config.start_from}"
    settle(verdict, name, anyway=config.anyway or not first.keeps_latents)
    logger.info("pictures beside their reconstructions: %s", folder / SHEET_NAME)


def judge_phase(
    config: PhaseConfig,
    run: RunConfig,
    folder: Path,
    accelerator: Accelerator,
    data: Pictures,
    objective: Objective,
) -> None:
    """Measure what a finished phase has made of the model; raise if the run should not go on."""
    owner = family(run.family)
    system = read_checkpoint(folder / CHECKPOINT_NAME).load().to(accelerator.device)
    pictures = data.to_judge(system.config.image_size_px, run, share_of(config, accelerator))
    verdict: Verdict | None = None
    if not objective.rebuilds:
        verdict = judge_generator(owner, system, pictures, seed=run.seed, sampling=run.sampling)
    elif can_rebuild(owner):
        verdict = judge_tokenizer(owner, system, pictures, seed=run.seed)
    if verdict is not None:
        file = folder / config.name / VERDICT_NAME
        settle(verdict, f"phase {config.name}:", anyway=run.anyway, file=file)


def has_begun_later(folder: Path, config: PhaseConfig, run: RunConfig) -> bool:
    """Return whether a later phase was built on this one, which is then not judged again."""
    names = [phase.name for phase in run.phases]
    return any((folder / name).exists() for name in names[names.index(config.name) + 1 :])


def forget_verdict(folder: Path, config: PhaseConfig) -> None:
    """Remove the verdict on a phase that has trained further since."""
    (folder / config.name / VERDICT_NAME).unlink(missing_ok=True)


def settled_again(folder: Path, config: PhaseConfig, run: RunConfig) -> bool:
    """Return whether a finished phase has a verdict; raise if it has stopped the run."""
    file = folder / config.name / VERDICT_NAME
    if not file.is_file():
        return False
    settle(Verdict.from_dict(read_json(file)), f"phase {config.name}:", anyway=run.anyway)
    return True
