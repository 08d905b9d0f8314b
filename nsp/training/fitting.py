"""Refuses data, batches and folders that do not fit a run, before or as soon as they are used."""

from pathlib import Path

from accelerate import Accelerator

from nsp.errors import ConfigError
from nsp.family.objective import Objective
from nsp.family.recipe import PhaseConfig, RunConfig
from nsp.family.recipes import option, presets_with
from nsp.family.registry import family
from nsp.training.data_order import StepSampler
from nsp.training.run_pictures import Pictures
from nsp.training.trainer import share_of


def check_place(folder: Path, config: RunConfig, *, resume: bool) -> None:
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


def check_pretrained(config: RunConfig) -> None:
    """Raise ConfigError for weights to begin with that do not exist."""
    for each in family(config.family).pretrained:
        place = config.model.get(each.field)
        if isinstance(place, str) and not Path(place).exists():
            raise ConfigError(
                f"{option(each.option)} {place} does not exist (relative to {Path.cwd()}); give "
                "the file or the checkpoint folder with the weights"
            )


def check_codes(config: RunConfig, phase: PhaseConfig, objective: Objective) -> None:
    """Raise ConfigError when a phase needs pictures; the data are codes."""
    if objective.takes_codes:
        return
    ways = ["give --data"]
    for each in family(config.family).pretrained:
        presets = presets_with(each.option, config.family)
        if each.phase == phase.name and presets:
            ways.append(f"give its weights with {option(each.option)} (of {', '.join(presets)})")
    raise ConfigError(
        f"phase {phase.name} needs pictures, but {config.data.source} is a folder of codes; "
        f"{', '.join(ways)}, or skip the phase with --from-phase"
    )


def check_batches(config: RunConfig, accelerator: Accelerator, data: Pictures) -> None:
    """Raise when the batch of a phase cannot be cut, or is larger than the data set."""
    for phase in config.phases:
        share = share_of(phase, accelerator)
        if data.source is not None:
            StepSampler(len(data.source), share, start=0, stop=0, seed=0)


def check_captions(
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
