"""Training runs of the family `next_scale`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

from nsp.errors import ConfigError
from nsp.families.next_scale.config import SIZES, NextScaleConfig, ScalesSettings
from nsp.family.recipe import (
    DataConfig,
    Epochs,
    OptimizerConfig,
    PhaseConfig,
    RunConfig,
    TrackingConfig,
)
from nsp.family.signature import OutputDir, PlannedAs, Range
from nsp.family.small_runs import RECONSTRUCTION, TEXT_ENCODER, smoke_run
from nsp.values import choice

_VAE, _SCALES, _SCALE = "vae", "scales", "scale_"
_ENDS = {"start_scale": "first_scale", "end_scale": "last_scale"}
_SIZES = ("initial_size", "target_size", "scale_factor")


class ScaleOptions(TypedDict, total=False):
    """The options of this family's runs; sizes that are not given are those of the named model."""

    size: Annotated[str, "Named model"]
    start_from: Annotated[str, "Checkpoint folder whose weights the run starts with"]
    vae: Annotated[Path, "AutoencoderKL folder to use; it is not trained further."]
    initial_size: Annotated[int, "Side length of the first latent.", Range(1)]
    target_size: Annotated[int, "Side length of the image in px.", Range(1)]
    scale_factor: Annotated[int, "Ratio of a latent's side to the one before.", Range(1)]
    start_scale: Annotated[int, "First scale to train.  [default: 0]", Range(0)]
    end_scale: Annotated[int, "Last scale to train.  [default: the final scale]", Range(0)]
    progressive: Annotated[bool, "Train one scale after the other, with a schedule each."]
    num_epochs_per_scale: Annotated[int, "Epochs for each scale.", Range(1)]


def emoji(**options: Unpack[ScaleOptions]) -> RunConfig:
    """Return text to emoji at 64 px from the embedded set, sized for two CPU cores.

    The base alone first: what a picture shows is decided there, and without the predictors behind
    it a step takes a third of the time.
    """
    vae = PhaseConfig(
        name=_VAE,
        steps=2000,
        batch_size=16,
        optimizer=dataclasses.replace(RECONSTRUCTION, lr=1.5e-3),
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
    run = RunConfig(
        family="next_scale",
        model=SIZES["emoji"].to_dict(),
        text_encoder=dict(TEXT_ENCODER),
        phases=(vae, base, scales),
        sampling={"guidance_scale": 2.0},
    )
    return adapted(run, **options)


def sdxl(
    *,
    data: Annotated[str, "it has no pictures of its own; give --data-dir"],
    stream: bool = False,
    **options: Unpack[ScaleOptions],
) -> Annotated[
    RunConfig, OutputDir("outputs"), PlannedAs({"data": "folder", "start_from": "checkpoint"})
]:
    """Return 16 to 1024 by 2 with a pretrained autoencoder: give also --vae and --text-encoder.

    Rates, batch, losses, epochs and folders are those of the first implementation of the idea. A
    stream has no epochs: its lengths are in steps.
    """
    scales = PhaseConfig(
        name=_SCALES,
        steps=100_000 if stream else Epochs(epochs=10),
        batch_size=8,
        optimizer=OptimizerConfig(
            lr=1e-4,
            betas=(0.9, 0.999),
            weight_decay=1e-5,
            schedule="cos",
            final_ratio=0.0,
            grad_clip=1.0,
        ),
        checkpoint_every=1000 if stream else Epochs(epochs=1),
        sample_every=5000,
        validate_every=1000 if stream else Epochs(epochs=1),
    )
    run = RunConfig(
        family="next_scale",
        model=SIZES["sdxl"].to_dict(),
        data=DataConfig(source=data, stream=stream, num_workers=4),
        phases=(scales,),
        sampling={"guidance_scale": 2.0},
        checkpoint_dir="checkpoints",
        tracking=TrackingConfig(log_dir="logs"),
    )
    return adapted(run, **options)


def smoke(**options: Unpack[ScaleOptions]) -> RunConfig:
    """Return a run of seconds, for tests: the tiny model at 16 px, four steps a phase."""
    return adapted(smoke_run(emoji(), SIZES["tiny"]), **options)


def adapted(run: RunConfig, **options: Unpack[ScaleOptions]) -> RunConfig:
    """Return the run with these options; it may come from a recipe, a file or a stopped run.

    The scales from `start_scale` to `end_scale` (inclusive) are trained together or, if
    `progressive`, one after the other. Raises ConfigError for values that do not fit, and if the
    run would have no autoencoder.
    """
    model = dict(run.model)
    if "size" in options:
        model = SIZES[choice("size", options["size"], SIZES)].to_dict()
    model |= {name: value for name, value in options.items() if name in _SIZES}
    if "vae" in options:
        from nsp.families.next_scale.vae import read_vae_config

        model["pretrained_vae"] = str(options["vae"])
        model["vae"] = read_vae_config(options["vae"]).to_dict()
        phases = tuple(phase for phase in run.phases if phase.name != _VAE)
        run = dataclasses.replace(run, phases=phases)
    config = NextScaleConfig.from_dict(model)  # report sizes that do not fit before pictures
    run = dataclasses.replace(
        run, model=model, start_from=options.get("start_from", run.start_from)
    )
    trains_vae = any(phase.name == _VAE for phase in run.phases)
    if not (trains_vae or config.pretrained_vae or run.start_from):
        raise ConfigError(
            "this run would begin with an untrained autoencoder; give a trained one with --vae "
            "FOLDER (an AutoencoderKL), or a trained model with --start-from CHECKPOINT"
        )
    if "num_epochs_per_scale" in options:
        length = Epochs(epochs=options["num_epochs_per_scale"])
        phases = tuple(
            dataclasses.replace(phase, steps=length) if _is_of_scales(phase) else phase
            for phase in run.phases
        )
        run = dataclasses.replace(run, phases=phases)
    ends = {_ENDS[name]: value for name, value in options.items() if name in _ENDS}
    is_progressive = options.get("progressive", False)
    return _cut(run, config, ends, is_progressive) if ends or is_progressive else run


def _is_of_scales(phase: PhaseConfig) -> bool:
    return phase.name == _SCALES or phase.name.startswith(_SCALE)


def _cut(
    run: RunConfig, config: NextScaleConfig, ends: dict[str, Any], is_progressive: bool
) -> RunConfig:
    """Return the run with the requested scales, in one phase or, if progressive, one phase each."""
    given = {phase.name: phase for phase in run.phases if _is_of_scales(phase)}
    whole = given.get(_SCALES)
    old = whole.objective if whole else {}
    settings = {name: value for name, value in old.items() if name not in _ENDS.values()}
    names = [
        f"{_SCALE}{scale}"
        for scale in ScalesSettings.from_dict({**settings, **ends}).scales(config)
    ]
    if whole is None:  # a continued run, which already has the requested phases
        if not set(names) <= given.keys():
            found = ", ".join(phase.name for phase in run.phases)
            raise ConfigError(
                f"this run has the phases {found}, not {', '.join(names)}; start another run with "
                "--output-dir"
            )
        return run
    parts = [dataclasses.replace(whole, objective={**settings, **ends})]
    if is_progressive:
        alike = dataclasses.replace(whole, objective=settings)
        parts = [given.get(name, dataclasses.replace(alike, name=name)) for name in names]
    before = [phase for phase in run.phases if not _is_of_scales(phase)]
    return dataclasses.replace(run, phases=(*before, *parts))
