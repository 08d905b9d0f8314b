"""The run that the options of `python train.py` make from a preset, a file or a resumed run."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.console.command_line import read_json
from nsp.errors import ConfigError

if TYPE_CHECKING:
    from nsp.family.recipe import RunConfig

# Fields of RunConfig that are options of the same name.
_OPTIONS = (
    "seed",
    "precision",
    "start_from",
    "parallel",
    "compile",
    "activation_checkpointing",
    "tracking",
    "checkpoint_dir",
)


def configure(
    preset: str | None,
    resumed: Path | None,
    *,
    config: Path | None = None,
    data: str | None = None,
    text_encoder: str | None = None,
    steps: int | None = None,
    mlflow: str | None = None,
    stream: bool = False,
    token_cache: str | None = None,
    from_phase: str | None = None,
    skip_bad_files: bool = False,
    **changes: Any,
) -> "RunConfig":
    """Return the run that a command line describes: from a file, a preset or a resumed folder.

    With a preset and a resumed run, options that are not given keep the values of the resumed run,
    so that they need not be repeated. `changes` are fields of RunConfig; None means no change.
    Raises ConfigError for an unknown preset or a value that is not allowed.
    """
    from nsp.family.recipe import RunConfig
    from nsp.training.folder import RUN_NAME, stored_run
    from nsp.training.presets import preset as named_run
    from nsp.training.run_options import OPTIONS, with_options

    stored: RunConfig | None = None
    if resumed is not None and (resumed / RUN_NAME).is_file():
        stored = stored_run(resumed)
    if preset is not None and config is not None:
        raise ConfigError(f"--preset {preset} and --config {config} are both given; choose one")
    if config is not None:
        if not config.is_file():
            raise ConfigError(f"{config} does not exist; give the JSON file of a run")
        run = RunConfig.from_dict(read_json(config))
    elif preset is None and stored is not None:
        run = stored
    else:
        run = named_run(preset or "emoji")
        if stored is not None:
            run = _with_options_of(run, stored)
    values = run.to_dict()
    if data is not None:
        values["data"]["source"] = data
    if text_encoder is not None:
        values["text_encoder"]["folder"] = text_encoder
    if stream:
        values["data"]["stream"] = True
    if token_cache is not None:
        values["data"]["token_cache"] = token_cache
    if mlflow is not None:
        values["tracking"]["mlflow"] = mlflow
    given = {name: value for name, value in changes.items() if value is not None}
    given = {name: value for name, value in given.items() if value or name != "progressive"}
    values |= {name: value for name, value in given.items() if name not in OPTIONS}
    run = with_options(
        RunConfig.from_dict(values),
        {name: given[name] for name in given if name in OPTIONS},
        skip_bad_files=skip_bad_files,
    )
    if from_phase is not None:
        run = _from_phase(run, from_phase)
    if steps is not None:
        phases = tuple(dataclasses.replace(each, steps=steps) for each in run.phases)
        run = dataclasses.replace(run, phases=phases)
    return run


def _from_phase(run: "RunConfig", name: str) -> "RunConfig":
    """Return the run without the phases before `name`; --start-from must give their results."""
    names = [phase.name for phase in run.phases]
    if name not in names:
        raise ConfigError(f"unknown phase {name!r} of this run; known: {', '.join(names)}")
    if name != names[0] and run.start_from is None:
        raise ConfigError(
            f"--from-phase {name} leaves out {names[0]}; give the checkpoint that has it with "
            "--start-from"
        )
    return dataclasses.replace(run, phases=run.phases[names.index(name) :])


def _with_options_of(run: "RunConfig", stored: "RunConfig") -> "RunConfig":
    """Return `run` with the fields that command-line options can change taken from `stored`."""
    steps = {phase.name: phase.steps for phase in stored.phases}
    folder = {k: v for k, v in stored.text_encoder.items() if k == "folder"}
    return dataclasses.replace(
        run,
        data=stored.data,
        text_encoder={**run.text_encoder, **folder},
        **{name: getattr(stored, name) for name in _OPTIONS},
        phases=tuple(
            dataclasses.replace(phase, steps=steps.get(phase.name, phase.steps))
            for phase in run.phases
        ),
    )
