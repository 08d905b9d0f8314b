"""Training runs of the family `inl_diffusion`: small ones, and those of the public package.

`inl_vae` and `inl_dit` have the options of its train_vae.py and train_dit.py, and read the same
environment variables: an option counts before a variable, a variable before a file, a file before
the recipe. Rates, schedules and losses are the public ones. What differs: a batch is that of one
optimizer step, which GRADIENT_ACCUMULATION cuts into parts; steps are optimizer steps.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack, cast

from nsp.errors import ConfigError
from nsp.families.inl_diffusion.config import SIZES, DitConfig, InlConfig
from nsp.family.recipe import (
    DataConfig,
    Epochs,
    OptimizerConfig,
    PhaseConfig,
    RunConfig,
    TrackingConfig,
)
from nsp.family.signature import Env, OutputDir, PlannedAs, Range
from nsp.family.small_runs import RECONSTRUCTION, TEXT_ENCODER, smoke_run

_VAE, _DIT = "vae", "dit"
_CIFAR10 = "hf:uoft-cs/cifar10"
_HUB = "hf:"
# The public names of what is recorded.
NAMES = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "samples": "samples/generated",
}
_TRACKING = TrackingConfig(log_name="runs", names=NAMES)


class _Shared(TypedDict, total=False):
    """The options of both public runs."""

    data: Annotated[str, "Pictures"]
    dataset: Annotated[str, "cifar10, a folder or .tar, or the name of a set on the hub."]
    image_size: Annotated[
        int, "Side of a picture in px.  [default: 256]", Range(8), Env("IMAGE_SIZE")
    ]
    batch_size: Annotated[int, "Pictures per step", Env("BATCH_SIZE")]
    max_steps: Annotated[int, "Optimizer steps.", Range(1), Env("MAX_STEPS")]
    epochs: Annotated[int, "Epochs instead of steps"]
    lr: Annotated[float, "Peak learning rate.  [default: 1e-4]", Env("LEARNING_RATE")]
    warmup_steps: Annotated[int, "Steps of rising rates.", Range(0), Env("WARMUP_STEPS")]
    save_interval: Annotated[
        int, "Steps between saved steps.  [default: 10000]", Range(1), Env("SAVE_EVERY")
    ]
    log_interval: Annotated[
        int, "Steps between reports.  [default: 100]", Range(1), Env("LOG_INTERVAL")
    ]


class VaeOptions(_Shared, total=False):
    """The options of `inl_vae`."""

    dataset_path: Annotated[str, "Folder of pictures, with or without captions."]
    base_channels: Annotated[
        int, "Channels of the first level.  [default: 128]", Range(1), Env("BASE_CHANNELS")
    ]
    latent_dim: Annotated[int, "Channels of a latent.  [default: 4]", Range(1), Env("LATENT_DIM")]
    kl_weight: Annotated[float, "Of the loss.  [default: 1e-6]", Range(0), Env("KL_WEIGHT")]
    vgg: Annotated[Path, "VGG16 weights (torchvision's state dict) for the perceptual loss."]


class DitOptions(_Shared, total=False):
    """The options of `inl_dit`."""

    vae_path: Annotated[Path, "Trained autoencoder: a checkpoint of inl_vae, or vae_final.pt."]
    start_from: Annotated[str, "Checkpoint folder whose weights the run starts with"]
    local_dataset: Annotated[str, "Folder of captioned pictures."]
    size: Annotated[str, "Named model"]
    dit_size: Annotated[
        Literal["S", "B", "L", "XL", "XXL", "L-MoE", "XL-MoE"],
        "Transformer.  [default: L]",
        Env("DIT_SIZE"),
    ]
    text_encoder: Annotated[str, "Pretrained CLIP or T5 folder; it is not trained further"]
    tokenizer_path: Annotated[
        Path, "Tokenizer folder for a new text encoder.", Env("TOKENIZER_PATH")
    ]
    cfg_dropout: Annotated[
        float, "Share of dropped prompts.  [default: 0.1]", Range(0, 0.999), Env("CFG_DROPOUT")
    ]
    accumulate: Annotated[
        int,
        "Parts of a batch, one after the other.  [default: 4]",
        Range(1),
        Env("GRADIENT_ACCUMULATION"),
    ]
    use_bf16: Annotated[bool, "Compute in bf16; otherwise fp32.", Env("USE_BF16")]


def emoji() -> RunConfig:
    """Return text to emoji at 64 px from the embedded set, sized for two CPU cores."""
    vae = PhaseConfig(
        name=_VAE,
        steps=2000,
        batch_size=16,
        optimizer=RECONSTRUCTION,
        sample_every=500,
    )
    dit = PhaseConfig(
        name=_DIT,
        steps=12_000,
        batch_size=16,
        optimizer=OptimizerConfig(
            lr=1e-3, weight_decay=0.01, schedule="cos", warmup_steps=250, grad_clip=1.0
        ),
        ema_decay=0.999,
        sample_every=2000,
        validate_every=2000,
    )
    return RunConfig(
        family="inl_diffusion",
        model=SIZES["emoji"].to_dict(),
        text_encoder=dict(TEXT_ENCODER),
        phases=(vae, dit),
        sampling={"num_inference_steps": 20, "sampler": "dpmpp_2m", "guidance_scale": 3.0},
    )


def smoke() -> RunConfig:
    """Return a run of seconds, for tests: the tiny model, two phases of four steps."""
    return smoke_run(emoji(), SIZES["tiny"])


def vae(
    **options: Unpack[VaeOptions],
) -> Annotated[
    RunConfig, OutputDir("vae_checkpoints", env="OUTPUT_DIR"), PlannedAs({"dataset": "folder"})
]:
    """Return the public training of an autoencoder; no captions are needed.

    Its checkpoint is what `inl_dit` takes as --vae-path. Transformer and text encoder are as small
    as can be, because they are not trained.
    """
    nothing = DitConfig(
        width=64,
        depth=1,
        num_heads=1,
        num_kv_heads=1,
        patch_size=1,
        context_width=64,
        context_length=8,
    )
    phase = PhaseConfig(
        name=_VAE,
        steps=100_000,
        batch_size=32,
        optimizer=dataclasses.replace(_optimizer(1000), schedule="cos", final_ratio=0.0),
        checkpoint_every=10_000,
        sample_every=1000,
        validate_every=1000,
        log_every=100,
    )
    run = RunConfig(
        family="inl_diffusion",
        model=InlConfig(dit=nothing).to_dict(),
        text_encoder={"vocab_size": 514, "depth": 1, "num_heads": 1},
        data=DataConfig(source=_source("inl_vae", options), flip=True, num_workers=4),
        phases=(phase,),
        tracking=_TRACKING,
    )
    return adapted_vae(run, **options)


def dit(
    **options: Unpack[DitOptions],
) -> Annotated[
    RunConfig,
    OutputDir("dit_checkpoints", env="OUTPUT_DIR"),
    PlannedAs({"dataset": "folder", "start_from": "checkpoint"}),
]:
    """Return the public training of a transformer: give also --vae-path.

    A pretrained --text-encoder stays as it is, and captions are read once; without one, a new
    encoder is trained with the transformer. Pictures are not mirrored: latents are computed once.
    """
    phase = PhaseConfig(
        name=_DIT,
        steps=500_000,
        batch_size=64,
        accumulate=4,
        optimizer=_optimizer(5000),
        objective={"sample_guidance_scale": 7.5, "sample_steps": 50},
        checkpoint_every=10_000,
        sample_every=10_000,
        validate_every=10_000,
        log_every=100,
    )
    run = RunConfig(
        family="inl_diffusion",
        model=SIZES["L"].to_dict(),
        text_encoder={"vocab_size": 32_000, "depth": 6, "num_heads": 16},
        data=DataConfig(source=_source("inl_dit", options)),
        phases=(phase,),
        tracking=_TRACKING,
    )
    return adapted_dit(run, **options)


def adapted_vae(
    run: RunConfig, **options: Unpack[VaeOptions]
) -> Annotated[RunConfig, OutputDir("vae_checkpoints", env="OUTPUT_DIR")]:
    """Return the run of an autoencoder with these options."""
    config, given = InlConfig.from_dict(run.model), dict[str, Any](options)
    sizes = {"base_channels": "base_channels", "latent_dim": "latent_channels"}
    changes = {field: given[name] for name, field in sizes.items() if name in given}
    config = dataclasses.replace(config, vae=dataclasses.replace(config.vae, **changes))
    config = _of_side(config, options.get("image_size"))
    own = dict[str, object]()
    if "kl_weight" in options:
        own["kl_weight"] = options["kl_weight"]
    if "vgg" in options:
        own["vgg"] = str(options["vgg"])
    return _shared(dataclasses.replace(run, model=config.to_dict()), own, cast("_Shared", options))


def adapted_dit(
    run: RunConfig, **options: Unpack[DitOptions]
) -> Annotated[RunConfig, OutputDir("dit_checkpoints", env="OUTPUT_DIR")]:
    """Return the run of a transformer with these options; ConfigError without an autoencoder."""
    config = InlConfig.from_dict(run.model)
    size = options.get("size", options.get("dit_size"))
    if size is not None:
        config = dataclasses.replace(config, dit=SIZES[_choice(size)].dit)
    if "vae_path" in options:
        config = _with_vae(config, options["vae_path"])
    config = _of_side(config, options.get("image_size"))
    start_from = options.get("start_from", run.start_from)
    if config.pretrained_vae is None and start_from is None:
        raise ConfigError(
            "inl_dit would begin with an untrained autoencoder; give a trained one with --vae-path "
            "(a checkpoint of inl_vae, or vae_final.pt), or a trained model with --start-from"
        )
    text, own = dict(run.text_encoder), dict[str, object]()
    if "tokenizer_path" in options:
        text["tokenizer"] = str(options["tokenizer_path"])
    if "text_encoder" in options:
        text["folder"] = options["text_encoder"]
        own["train_text_encoder"] = False
        config = dataclasses.replace(config, text=_text_kind(Path(options["text_encoder"])))
    if "cfg_dropout" in options:
        own["cond_drop_rate"] = options["cfg_dropout"]
    precision = run.precision
    if "use_bf16" in options:
        precision = "bf16" if options["use_bf16"] else "fp32"
    run = dataclasses.replace(
        run,
        model=config.to_dict(),
        start_from=start_from,
        text_encoder=text,
        precision=precision,
    )
    return _shared(run, own, cast("_Shared", options))


def options_of(run: Mapping[str, object]) -> Callable[..., RunConfig] | None:
    """Return the options for a run that one of the public recipes has made; else None."""
    tracking, phases = run.get("tracking"), run.get("phases")
    if not isinstance(tracking, Mapping) or tracking.get("names") != NAMES:
        return None
    if not isinstance(phases, list) or len(phases) != 1:
        return None
    known: dict[str, Callable[..., RunConfig]] = {_VAE: adapted_vae, _DIT: adapted_dit}
    return known.get(str(phases[0].get("name"))) if isinstance(phases[0], Mapping) else None


def _shared(run: RunConfig, objective: Mapping[str, object], options: _Shared) -> RunConfig:
    """Return the run with the options of both recipes, and these settings of its objective."""
    (phase,) = run.phases
    places = {
        "batch_size": "batch_size",
        "max_steps": "steps",
        "save_interval": "checkpoint_every",
        "log_interval": "log_every",
        "accumulate": "accumulate",
    }
    given = dict[str, Any](options)
    changes = {field: given[name] for name, field in places.items() if name in options}
    if "epochs" in options:
        changes["steps"] = Epochs(epochs=options["epochs"])
    if "save_interval" in options and phase.sample_every == phase.checkpoint_every:
        changes["sample_every"] = options["save_interval"]
    rates = {"lr": "lr", "warmup_steps": "warmup_steps"}
    optimizer = {field: given[name] for name, field in rates.items() if name in options}
    phase = dataclasses.replace(
        phase,
        **changes,
        objective={**phase.objective, **objective},
        optimizer=dataclasses.replace(phase.optimizer, **optimizer),
    )
    data = run.data
    if source := _named_source(options):
        data = dataclasses.replace(data, source=source)
    return dataclasses.replace(run, phases=(phase,), data=data)


def _optimizer(warmup_steps: int) -> OptimizerConfig:
    """Return the public AdamW: a linear warm-up, then a constant rate."""
    return OptimizerConfig(
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        schedule="constant",
        warmup_steps=warmup_steps,
        grad_clip=1.0,
    )


def _source(recipe: str, options: Mapping[str, Any]) -> str:
    """Return the pictures of a new run; ConfigError if none are given."""
    source = _named_source(options)
    if source is None:
        own = "--dataset-path FOLDER" if recipe == "inl_vae" else "--local-dataset FOLDER"
        raise ConfigError(
            f"{recipe} has no pictures of its own; give --dataset cifar10, a folder or a name on "
            f"the hub, or {own}"
        )
    return source


def _named_source(options: Mapping[str, Any]) -> str | None:
    """Return the pictures that options name; ConfigError if two name different ones."""
    places = {
        name: str(options[name])
        for name in ("dataset_path", "local_dataset", "data")
        if name in options
    }
    if "dataset" in options:
        places["dataset"] = _dataset(options["dataset"])
    if len(set(places.values())) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in list(places)[:2])
        raise ConfigError(f"{first} and {second} name different pictures; give one of them")
    return next(iter(places.values()), None)


def _dataset(name: str) -> str:
    """Return where a public name of a data set leads: a path, the embedded set, or the hub."""
    if name == "cifar10":
        return _CIFAR10
    if name == "emoji" or name.startswith((_HUB, ".", "/", "~")) or Path(name).exists():
        return name
    return _HUB + name


def _of_side(config: InlConfig, side_px: int | None) -> InlConfig:
    """Return the model for pictures of this side; None: as it is."""
    if side_px is None:
        return config
    least = config.vae.downsampling * config.dit.patch_size
    if side_px % least:
        raise ConfigError(
            f"image_size {side_px} must be a multiple of {least}: the autoencoder's "
            f"{config.vae.downsampling} px a cell, {config.dit.patch_size} cells a patch"
        )
    return dataclasses.replace(config, latent_side=side_px // config.vae.downsampling)


def _with_vae(config: InlConfig, path: Path) -> InlConfig:
    """Return the model with the autoencoder at `path`, for pictures of the same size."""
    from nsp.families.inl_diffusion.pretrained import read_vae_config

    side_px = config.image_size_px
    config = dataclasses.replace(config, vae=read_vae_config(path), pretrained_vae=str(path))
    return _of_side(config, side_px)


def _choice(size: str) -> str:
    from nsp.values import choice

    return choice("size", size, SIZES)


def _text_kind(folder: Path) -> Literal["clip", "t5"]:
    """Return the kind of a pretrained text encoder; reading it says what else is wrong."""
    for place in (folder / "text_encoder", folder):
        try:
            kind = json.loads((place / "config.json").read_bytes()).get("model_type")
        except (OSError, ValueError, AttributeError):
            continue
        return "t5" if "t5" in str(kind) else "clip"
    return "clip"


RECIPES: Mapping[str, Callable[..., RunConfig]] = {
    "inl_diffusion": emoji,
    "inl_vae": vae,
    "inl_dit": dit,
    "inl_diffusion_smoke": smoke,
}
