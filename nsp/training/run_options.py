"""Command-line options of a training run that a family handles or that change several fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nsp.data.sources import open_source
from nsp.errors import ConfigError
from nsp.family.recipe import PhaseConfig, RunConfig
from nsp.family.registry import family

# Options that only some families have; `Family.with_options` handles them.
FAMILY_OPTIONS = (
    *("initial_size", "target_size", "scale_factor", "pretrained_vae"),
    *("start_scale", "end_scale", "progressive", "num_epochs_per_scale"),
)
_OF_DATA = {"val_dir": "validation", "num_workers": "num_workers"}
_OF_PHASES = {"batch_size": "batch_size"}
_IN_EPOCHS = {"save_every": "checkpoint_every", "validate_every": "validate_every"}
OPTIONS = (
    *(*FAMILY_OPTIONS, *_OF_DATA, *_OF_PHASES, *_IN_EPOCHS),
    *("learning_rate", "checkpoint_dir", "log_dir"),
)


def with_options(
    run: RunConfig, options: Mapping[str, Any], *, skip_bad_files: bool = False
) -> RunConfig:
    """Return the run, changed by the given `options` (names as in OPTIONS).

    Epochs are converted to steps by counting the pictures, without bad files if these are left out.
    Raises ConfigError for an option that the run's family does not have, for a value that is not
    allowed, and for an option that the family needs and that is missing.
    """
    data = {field: options[name] for name, field in _OF_DATA.items() if name in options}
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, **data))
    fields = {field: options[name] for name, field in _OF_PHASES.items() if name in options}
    if fields or "learning_rate" in options:
        phases = tuple(_changed(phase, fields, options) for phase in run.phases)
        run = dataclasses.replace(run, phases=phases)
    if "checkpoint_dir" in options:
        run = dataclasses.replace(run, checkpoint_dir=options["checkpoint_dir"])
    if "log_dir" in options:
        tracking = dataclasses.replace(run.tracking, log_dir=options["log_dir"])
        run = dataclasses.replace(run, tracking=tracking)
    own = {name: options[name] for name in FAMILY_OPTIONS if name in options}
    run = _of_family(run, own, skip_bad_files)
    if counted := {_IN_EPOCHS[name]: options[name] for name in _IN_EPOCHS if name in options}:
        pictures = _num_pictures(run, skip_bad_files)
        phases = tuple(
            dataclasses.replace(
                phase, **{n: count * _epoch(phase, pictures) for n, count in counted.items()}
            )
            for phase in run.phases
        )
        run = dataclasses.replace(run, phases=phases)
    return run


def _changed(
    phase: PhaseConfig, fields: Mapping[str, Any], options: Mapping[str, Any]
) -> PhaseConfig:
    optimizer = phase.optimizer
    if "learning_rate" in options:
        optimizer = dataclasses.replace(optimizer, lr=options["learning_rate"])
    return dataclasses.replace(phase, optimizer=optimizer, **fields)


def _of_family(run: RunConfig, options: dict[str, Any], skip_bad_files: bool) -> RunConfig:
    """Return the run with its family's changes."""
    epochs = options.pop("num_epochs_per_scale", None)
    pictures = 0 if epochs is None else _num_pictures(run, skip_bad_files)
    return family(run.family).with_options(
        run, options, lambda phase: (epochs or 0) * _epoch(phase, pictures)
    )


def _num_pictures(run: RunConfig, skip_bad_files: bool) -> int:
    if run.data.stream:
        raise ConfigError("a stream has no epochs; give --steps instead of options in epochs")
    return len(open_source(run.data.source, skip_bad_files=skip_bad_files))


def _epoch(phase: PhaseConfig, num_pictures: int) -> int:
    """Return the steps of one epoch, cut as in `StepSampler`."""
    return max(num_pictures // phase.batch_size, 1)
