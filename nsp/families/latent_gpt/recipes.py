"""Training runs of the family `latent_gpt`: the three phases of its reference, and small ones.

Phase 1 trains the transformer on a published tokenizer's codes, phase 2 a tokenizer, phase 3 the
transformer on that one's codes. Each has an experiment of its own in MLflow (train.py --mlflow).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

from nsp.errors import ConfigError
from nsp.families.latent_gpt.config import SIZES, GptConfig, LatentGptConfig
from nsp.family.recipe import (
    DataConfig,
    OptimizerConfig,
    PhaseConfig,
    RunConfig,
    TrackingConfig,
)
from nsp.family.signature import PlannedAs, Range
from nsp.family.small_runs import RECONSTRUCTION, TEXT_ENCODER, smoke_run
from nsp.values import choice

_TOKENIZER, _PREDICTOR = "tokenizer", "predictor"
_NO_PICTURES = "it has no pictures of its own; give --data-dir"
Data = Annotated[str, _NO_PICTURES]
Run = Annotated[RunConfig, PlannedAs({"data": "folder", "start_from": "checkpoint"})]


class LatentGptOptions(TypedDict, total=False):
    """The options of this family's runs."""

    size: Annotated[str, "Named model"]
    start_from: Annotated[str, "Checkpoint folder whose weights the run starts with"]
    vqvae: Annotated[
        Path, "Image tokenizer to use, VQGAN weights or a checkpoint; it is not trained further."
    ]
    unconditional: Annotated[bool, "Draw pictures without prompts."]
    patch_level: Annotated[int, "Levels of patches, the widest first; 1: codes alone.", Range(1)]


def emoji(**options: Unpack[LatentGptOptions]) -> RunConfig:
    """Return text to emoji at 64 px from the embedded set, sized for two CPU cores."""
    tokenizer = PhaseConfig(
        name=_TOKENIZER,
        steps=3600,
        batch_size=32,
        optimizer=RECONSTRUCTION,
        sample_every=1200,
    )
    predictor = PhaseConfig(
        name=_PREDICTOR,
        steps=12_000,
        batch_size=16,
        optimizer=OptimizerConfig(
            lr=1e-3, weight_decay=0.03, warmup_steps=250, final_ratio=0.02, grad_clip=1.0
        ),
        ema_decay=0.999,
        sample_every=2000,
        validate_every=2000,
    )
    run = RunConfig(
        family="latent_gpt",
        model=SIZES["emoji"].to_dict(),
        text_encoder=dict(TEXT_ENCODER),
        phases=(tokenizer, predictor),
        sampling={"guidance_scale": 2.0, "top_k": 100},
    )
    return adapted(run, **options)


def pretrained(*, data: Data, **options: Unpack[LatentGptOptions]) -> Run:
    """Return phase 1, the transformer on a published tokenizer's codes: give also --vqvae."""
    run = _transformer(data, steps=100_000, batch_size=32, warmup_steps=1000, checkpoint_every=5000)
    tracking = _tracking("latent-gpt-pretrained-vqvae", phase="1", vqvae_source="pretrained")
    return adapted(dataclasses.replace(run, tracking=tracking), **options)


def vqvae(*, data: Data) -> Annotated[RunConfig, PlannedAs({"data": "folder"})]:
    """Return phase 2, an image tokenizer; its checkpoint is what phase 3 takes as --vqvae."""
    nothing = GptConfig(depth=1, width=64, num_heads=1)  # is not trained
    model = dataclasses.replace(SIZES["500m"], gpt=nothing, text=None)
    tokenizer = PhaseConfig(
        name=_TOKENIZER,
        steps=100_000,
        batch_size=32,
        optimizer=_optimizer(lr=1e-4, warmup_steps=1000, weight_decay=0.0),
        checkpoint_every=5000,
        sample_every=5000,
        validate_every=1000,
        log_every=100,
    )
    run = RunConfig(
        family="latent_gpt",
        model=model.to_dict(),
        data=DataConfig(source=data, flip=True, crop=True, num_workers=4),
        phases=(tokenizer,),
        seed=42,
        precision="bf16",
        tracking=_tracking("vqvae-training", phase="2", vqvae_source="custom"),
    )
    return adapted(run)


def custom(*, data: Data, **options: Unpack[LatentGptOptions]) -> Run:
    """Return phase 3, the transformer on the codes of phase 2's tokenizer: give it as --vqvae."""
    run = _transformer(
        data, steps=200_000, batch_size=256, warmup_steps=2000, checkpoint_every=10_000
    )
    tracking = _tracking("latent-gpt-custom-vqvae", phase="3", vqvae_source="custom")
    return adapted(dataclasses.replace(run, tracking=tracking), **options)


def smoke(**options: Unpack[LatentGptOptions]) -> RunConfig:
    """Return a run of seconds, for tests: the tiny model, two phases of four steps."""
    return adapted(smoke_run(emoji(), SIZES["tiny"]), **options)


def _transformer(
    data: str, *, steps: int, batch_size: int, warmup_steps: int, checkpoint_every: int
) -> RunConfig:
    """Return the training of the large transformer beside a pretrained CLIP."""
    predictor = PhaseConfig(
        name=_PREDICTOR,
        steps=steps,
        batch_size=batch_size,
        optimizer=_optimizer(lr=1e-4, warmup_steps=warmup_steps),
        objective={"train_text_encoder": False},
        checkpoint_every=checkpoint_every,
        sample_every=checkpoint_every,
        validate_every=checkpoint_every // 5,
        log_every=100,
    )
    return RunConfig(
        family="latent_gpt",
        model=SIZES["500m"].to_dict(),
        data=DataConfig(source=data, num_workers=4),
        phases=(predictor,),
        sampling={"guidance_scale": 3.0, "top_k": 100, "top_p": 0.9},
        seed=42,
        precision="bf16",
    )


def _optimizer(*, lr: float, warmup_steps: int, weight_decay: float = 0.01) -> OptimizerConfig:
    """Return AdamW with a linear warm-up and a linear fall to zero."""
    return OptimizerConfig(
        lr=lr,
        betas=(0.9, 0.999),
        weight_decay=weight_decay,
        schedule="lin00",
        warmup_steps=warmup_steps,
        warmup_start=0.0,
        final_ratio=0.0,
        grad_clip=1.0,
    )


def _tracking(experiment: str, **tags: str) -> TrackingConfig:
    return TrackingConfig(experiment=experiment, tags=tags)


def adapted(run: RunConfig, **options: Unpack[LatentGptOptions]) -> RunConfig:
    """Return the run with these options; it may come from a recipe, a file or a stopped run.

    Raises ConfigError for values that do not fit, and if the transformer would learn the codes of
    an untrained tokenizer.
    """
    model: dict[str, Any] = dict(run.model)
    if "size" in options:
        model = SIZES[choice("size", options["size"], SIZES)].to_dict()
    if options.get("unconditional"):
        model["text"] = None
    phases = run.phases
    if "vqvae" in options:
        model["pretrained_vq"] = str(options["vqvae"])
        phases = tuple(phase for phase in phases if phase.name != _TOKENIZER)
    if "patch_level" in options:
        levels = {"patch_level": options["patch_level"]}
        phases = tuple(
            dataclasses.replace(phase, objective={**phase.objective, **levels})
            if phase.name == _PREDICTOR
            else phase
            for phase in phases
        )
    config = LatentGptConfig.from_dict(model)
    start_from = options.get("start_from", run.start_from)
    if config.pretrained_vq and start_from:
        raise ConfigError(
            f"the image tokenizer would come from {config.pretrained_vq} and from {start_from}; "
            "give only one of --vqvae and --start-from"
        )
    trains_tokenizer = any(phase.name == _TOKENIZER for phase in phases)
    if not (trains_tokenizer or config.pretrained_vq or start_from):
        raise ConfigError(
            "this run would begin with an untrained image tokenizer; give a trained one with "
            "--vqvae (VQGAN weights, or a checkpoint), or a trained model with --start-from"
        )
    tags = {**run.tracking.tags, **_tags(config)} if run.tracking.tags else {}
    if not any(phase.name == _PREDICTOR for phase in phases):
        tags.pop("model_size", None)  # the transformer is not trained
    return dataclasses.replace(
        run,
        model=model,
        phases=phases,
        start_from=start_from,
        tracking=dataclasses.replace(run.tracking, tags=tags),
    )


def _tags(config: LatentGptConfig) -> dict[str, str]:
    """Return what the records of a run say of its model."""
    gpt = config.gpt
    named = [name for name, size in SIZES.items() if size.gpt == gpt]
    return {
        "resolution": str(config.image_size_px),
        "conditioning": "unconditional" if config.text is None else "text_conditional",
        "model_size": named[0] if named else f"{gpt.depth}x{gpt.width}",
    }


RECIPES: Mapping[str, Callable[..., RunConfig]] = {
    "latent_gpt": emoji,
    "latent_gpt_pretrained": pretrained,
    "latent_gpt_vqvae": vqvae,
    "latent_gpt_custom": custom,
    "latent_gpt_smoke": smoke,
}
