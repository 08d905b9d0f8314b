"""The run that the options of `python train.py` make from a recipe, a file or a resumed run."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nsp.console.run_files import read_run
from nsp.errors import ConfigError
from nsp.family.recipe import Epochs, PhaseConfig, RunConfig
from nsp.family.recipes import Recipe, check_model, check_options, default_recipe, recipe
from nsp.family.registry import family
from nsp.family.run_values import with_texts, with_values
from nsp.family.signature import parameters
from nsp.values import choice, nearest

# The options of every run: the places of their values in its configuration.
PLACES: Mapping[str, str] = {
    "data": "data.source",
    "val_dir": "data.validation",
    "val_share": "data.val_share",
    "num_workers": "data.num_workers",
    "stream": "data.stream",
    "token_cache": "data.token_cache",
    "text_encoder": "text_encoder.folder",
    "checkpoint_dir": "checkpoint_dir",
    "log_dir": "tracking.log_dir",
    "log_with": "tracking.log_with",
    "mlflow": "tracking.mlflow",
    "batch_size": "phases.*.batch_size",
    "learning_rate": "phases.*.optimizer.lr",
    "save_every": "phases.*.checkpoint_every",
    "validate_every": "phases.*.validate_every",
    "epochs": "phases.*.epochs",
    "steps": "phases.*.steps",
    "seed": "seed",
    "precision": "precision",
    "start_from": "start_from",
    "parallel": "parallel",
    "compile": "compile",
    "activation_checkpointing": "activation_checkpointing",
    "anyway": "anyway",
}
_IN_EPOCHS = ("save_every", "validate_every")
_FIELD = re.compile(r"^RunConfig(\.[\w.\[\]]+)?: ")  # at the head of an error about a record
_A = TypeVar("_A")

# Fields that a resumed run keeps although its preset is given again.
_KEPT = (
    *("data", "seed", "precision", "start_from", "parallel", "compile"),
    *("activation_checkpointing", "anyway", "tracking", "checkpoint_dir", "copy_dir"),
)


def configure(
    preset: str | None,
    resumed: Path | None,
    *,
    config: Path | None = None,
    size: str | None = None,
    from_phase: str | None = None,
    assignments: Sequence[str] = (),
    **options: Any,
) -> RunConfig:
    """Return the run that a command line describes: from a recipe, a file or a resumed folder.

    `options` are those of every run (PLACES) and of the recipe or family; None means not given.
    With a preset and a resumed run, options that are not given keep the values of the resumed run,
    so that they need not be repeated. Raises ConfigError for an unknown name, naming the nearest,
    or a value that is not allowed.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    common = {name: given[name] for name in given if name in PLACES}
    own = {name: given[name] for name in given if name not in PLACES}
    if size is not None:
        own["size"] = size
    if {"steps", "epochs"} <= common.keys():
        raise ConfigError("--steps and --epochs are both given; choose one")
    if preset is not None and config is not None:
        raise ConfigError(f"--preset {preset} and --config {config} are both given; choose one")
    stored = _stored(resumed)
    if config is not None:
        run = _adapted(read_run(config), own, common)
    elif preset is None and stored is not None:
        run = _adapted(stored, own, common)
    else:
        run = _from_recipe(recipe(preset or default_recipe(given | own)), own, common, stored)
    if common:
        placed = {
            f"--{name.replace('_', '-')} {value}": (PLACES[name], _value(name, value))
            for name, value in common.items()
        }
        run = _assigned(run, with_values, placed)
    if assignments:
        run = _assigned(run, with_texts, {f"--set {text}": text for text in assignments})
    check_model(run)
    return run if from_phase is None else _from_phase(run, from_phase)


def _assigned(
    run: RunConfig,
    assign: Callable[[RunConfig, Sequence[_A]], RunConfig],
    given: Mapping[str, _A],
) -> RunConfig:
    """Return the run with all assignments, each given in these words on the command line.

    The error about a wrong one names it in these words; that about several that do not fit
    together, the fields of the configuration.
    """
    try:
        return assign(run, list(given.values()))
    except ConfigError:
        for words, each in given.items():
            try:
                assign(run, [each])
            except ConfigError as error:
                said = _FIELD.sub("", str(error))
                raise ConfigError(
                    said if said.startswith("--set") else f"{words}: {said}"
                ) from error
        raise


def _value(name: str, given: Any) -> Any:
    """Return the value of a common option as the run's dictionary has it."""
    return Epochs(epochs=given).to_dict() if name in _IN_EPOCHS else given


def _stored(folder: Path | None) -> RunConfig | None:
    """Return the run in a folder, if there is one."""
    if folder is None or not (folder / "run.json").is_file():
        return None
    from nsp.training.folder import stored_run

    return stored_run(folder)


def _from_recipe(
    found: Recipe, own: Mapping[str, Any], common: Mapping[str, Any], stored: RunConfig | None
) -> RunConfig:
    """Return the run of a recipe; `stored` is the run that it continues."""
    takes = {each.name for each in found.parameters}
    passed = {name: value for name, value in common.items() if name in takes}
    if stored is not None and "data" in takes:
        passed.setdefault("data", stored.data.source)
    has_size = "size" in takes
    rest = {name: value for name, value in own.items() if name != "size" or has_size}
    run = found.run(**rest, **passed)
    if not has_size:
        run = _of_size(run, own.get("size"))
    if stored is None:
        return run
    run = with_values(_continued(run, stored), _said(found, run, passed))
    change = family(run.family).run_options
    known = set() if change is None else {each.name for each in parameters(change, skip=1)}
    again = {name: value for name, value in own.items() if name in known or name == "size"}
    return _adapted(run, again, common) if again else run


def _said(found: Recipe, run: RunConfig, passed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of what a recipe's own options change in fields of _KEPT."""
    try:
        plain = found.run(**passed)
    except ConfigError:  # the recipe is not complete without them
        return
    from nsp.training.folder import differing_values

    for name, _, value in differing_values(plain.to_dict(), run.to_dict()):
        if name.partition(".")[0] in _KEPT:
            yield name, value


def _adapted(run: RunConfig, own: Mapping[str, Any], common: Mapping[str, Any]) -> RunConfig:
    """Return a run from a file or a folder with the options of its family."""
    change = family(run.family).options_of(run.to_dict())
    known = () if change is None else parameters(change, skip=1)
    takes = {each.name for each in known}
    rest = dict(own)
    if "size" not in takes:
        run = _of_size(run, rest.pop("size", None))
    check_options(f"family {run.family}", known, rest)
    if change is None:
        return run
    return change(run, **rest, **{name: common[name] for name in common if name in takes})


def _of_size(run: RunConfig, name: str | None) -> RunConfig:
    """Return the run with a named model of its family; None: its own."""
    if name is None:
        return run
    sizes = family(run.family).sizes
    chosen = sizes[choice(f"size of family {run.family}", name, sizes)]
    return dataclasses.replace(run, model=chosen.to_dict())


def _from_phase(run: RunConfig, name: str) -> RunConfig:
    """Return the run without the phases before `name`; --start-from must give their results."""
    names = [phase.name for phase in run.phases]
    if name not in names:
        raise ConfigError(f"unknown phase {name!r} of this run{nearest(name, names)}")
    if name != names[0] and run.start_from is None:
        raise ConfigError(
            f"--from-phase {name} leaves out {names[0]}; give the checkpoint that has it with "
            "--start-from"
        )
    return dataclasses.replace(run, phases=run.phases[names.index(name) :])


def _continued(run: RunConfig, stored: RunConfig) -> RunConfig:
    """Return `run` with the fields that common options can change taken from `stored`."""
    before = {phase.name: phase for phase in stored.phases}
    folder = {name: value for name, value in stored.text_encoder.items() if name == "folder"}
    return dataclasses.replace(
        run,
        text_encoder={**run.text_encoder, **folder},
        **{name: getattr(stored, name) for name in _KEPT},
        phases=tuple(
            _with_lengths(phase, before[phase.name]) if phase.name in before else phase
            for phase in run.phases
        ),
    )


def _with_lengths(phase: PhaseConfig, stored: PhaseConfig) -> PhaseConfig:
    """Return the phase with the stored number of steps, and the warm-up that epochs came to."""
    optimizer = phase.optimizer
    if isinstance(optimizer.warmup_steps, Epochs):
        counted_up = stored.optimizer.warmup_steps
        optimizer = dataclasses.replace(optimizer, warmup_steps=counted_up)
    return dataclasses.replace(phase, steps=stored.steps, optimizer=optimizer)
