"""Training runs of the family `next_scale`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nsp.errors import ConfigError
from nsp.families.next_scale.config import SIZES, NextScaleConfig
from nsp.families.next_scale.objective import ScalesSettings
from nsp.family.recipe import OptimizerConfig, PhaseConfig, RunConfig

_VAE, _SCALES, _SCALE = "vae", "scales", "scale_"
# From the first implementation's command line; options in epochs do not work with a stream.
SDXL_OPTIONS: Mapping[str, Any] = {
    "output_dir": Path("outputs"),
    "checkpoint_dir": "checkpoints",
    "log_dir": "logs",
    "num_workers": 4,
    "num_epochs_per_scale": 10,
    "save_every": 1,
    "validate_every": 1,
}
_RANGE = ("start_scale", "end_scale", "progressive")
_ENDS = ("first_scale", "last_scale")
_SIZES = ("initial_size", "target_size", "scale_factor")


def emoji() -> RunConfig:
    """Return text to emoji at 64 px from the embedded set, sized for two CPU cores.

    The base alone first: what a picture shows is decided there, and without the predictors behind
    it a step takes a third of the time.
    """
    vae = PhaseConfig(
        name=_VAE,
        steps=2000,
        batch_size=16,
        optimizer=OptimizerConfig(
            lr=1.5e-3,
            weight_decay=0.0,
            schedule="cos",
            warmup_steps=100,
            final_ratio=0.02,
            grad_clip=1.0,
        ),
        sample_every=400,
    )
    base = PhaseConfig(
        name=f"{_SCALE}0",
        steps=7000,
        batch_size=32,
        optimizer=OptimizerConfig(
            lr=1.2e-3, weight_decay=0.02, schedule="cos", warmup_steps=200, grad_clip=1.0
        ),
        ema_decay=0.999,
        sample_every=1000,
        validate_every=1000,
    )
    scales = dataclasses.replace(
        base,
        name=_SCALES,
        steps=2000,
        batch_size=16,
        optimizer=dataclasses.replace(base.optimizer, lr=1e-3),
        objective={"first_scale": 1},
    )
    return RunConfig(
        family="next_scale",
        model=SIZES["emoji"].to_dict(),
        text_encoder={"vocab_size": 2048, "depth": 2, "num_heads": 4},
        phases=(vae, base, scales),
        sampling={"guidance_scale": 2.0},
    )


def sdxl() -> RunConfig:
    """Return 16 to 1024 by 2 with a pretrained autoencoder: give --data, --vae, --text-encoder.

    Rates, batch and losses are those of the first implementation of the idea, as are
    `SDXL_OPTIONS`, which set the number of steps.
    """
    scales = PhaseConfig(
        name=_SCALES,
        steps=100_000,
        batch_size=8,
        optimizer=OptimizerConfig(
            lr=1e-4,
            betas=(0.9, 0.999),
            weight_decay=1e-5,
            schedule="cos",
            final_ratio=0.0,
            grad_clip=1.0,
        ),
        checkpoint_every=1000,
        sample_every=5000,
        validate_every=1000,
    )
    return RunConfig(
        family="next_scale",
        model=SIZES["sdxl"].to_dict(),
        phases=(scales,),
        sampling={"guidance_scale": 2.0},
    )


def smoke() -> RunConfig:
    """Return a run of seconds, for tests: the tiny model at 16 px, four steps a phase."""
    run = emoji()
    phases = tuple(
        dataclasses.replace(
            phase,
            steps=4,
            batch_size=8,
            optimizer=dataclasses.replace(phase.optimizer, warmup_steps=1),
            checkpoint_every=2,
            sample_every=2,
            validate_every=2,
            log_every=1,
        )
        for phase in run.phases
    )
    return dataclasses.replace(
        run,
        model=SIZES["tiny"].to_dict(),
        text_encoder={"vocab_size": 600, "depth": 1, "num_heads": 2},
        phases=phases,
    )


def with_options(
    run: RunConfig, options: Mapping[str, Any], steps_of: Callable[[PhaseConfig], int]
) -> RunConfig:
    """Return the run with this family's options of the command line, of which any may be absent.

    Sizes of the model; `pretrained_vae`; `start_scale` to `end_scale` (inclusive), trained together
    or, where `progressive`, one after the other with a schedule each. `steps_of` counts the steps
    of a phase, 0 where the phase's own stay. A pretrained autoencoder is not trained further.
    Raises ConfigError for values that do not fit, and where the run would have no autoencoder.
    """
    model = dict(run.model)
    model |= {name: options[name] for name in (*_SIZES, "pretrained_vae") if name in options}
    if "pretrained_vae" in options:
        from nsp.families.next_scale.vae import read_vae_config

        model["vae"] = read_vae_config(Path(options["pretrained_vae"])).to_dict()
        phases = tuple(phase for phase in run.phases if phase.name != _VAE)
        run = dataclasses.replace(run, phases=phases)
    NextScaleConfig.from_dict(model)  # report sizes that do not fit before pictures are read
    run = dataclasses.replace(run, model=model)
    trains_vae = any(phase.name == _VAE for phase in run.phases)
    if not (trains_vae or model.get("pretrained_vae") or run.start_from):
        raise ConfigError(
            "this run would begin with an untrained autoencoder; give a trained one with --vae "
            "FOLDER (an AutoencoderKL), or a trained model with --start-from CHECKPOINT"
        )
    wanted = {name: options[name] for name in _RANGE if name in options}
    phases = tuple(
        dataclasses.replace(phase, steps=steps_of(phase) or phase.steps)
        if _is_of_scales(phase)
        else phase
        for phase in run.phases
    )
    run = dataclasses.replace(run, phases=phases)
    return _cut(run, wanted) if wanted else run


def _is_of_scales(phase: PhaseConfig) -> bool:
    return phase.name == _SCALES or phase.name.startswith(_SCALE)


def _cut(run: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """Return the run with the requested scales, in one phase or, if progressive, one phase each."""
    given = {phase.name: phase for phase in run.phases if _is_of_scales(phase)}
    whole = given.get(_SCALES)
    settings = {n: v for n, v in (whole.objective if whole else {}).items() if n not in _ENDS}
    ends = {_ENDS[i]: options[n] for i, n in enumerate(_RANGE[:2]) if n in options}
    range_of = ScalesSettings.from_dict({**settings, **ends}).scales
    names = [f"{_SCALE}{scale}" for scale in range_of(NextScaleConfig.from_dict(run.model))]
    if whole is None:  # a continued run, which already has the requested phases
        if not set(names) <= given.keys():
            found = ", ".join(phase.name for phase in run.phases)
            raise ConfigError(
                f"this run has the phases {found}, not {', '.join(names)}; start another run with "
                "--output-dir"
            )
        return run
    parts = [dataclasses.replace(whole, objective={**settings, **ends})]
    if options.get("progressive"):
        alike = dataclasses.replace(whole, objective=settings)
        parts = [given.get(name, dataclasses.replace(alike, name=name)) for name in names]
    before = [phase for phase in run.phases if not _is_of_scales(phase)]
    return dataclasses.replace(run, phases=(*before, *parts))
