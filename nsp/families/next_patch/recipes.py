"""Training runs of the family `next_patch`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from nsp.artifacts.checkpoint import is_checkpoint, read_checkpoint
from nsp.errors import ConfigError
from nsp.families.next_patch.config import SIZES, VQ_8, VQ_16, published
from nsp.family.classes import ClassCondition
from nsp.family.recipe import DataConfig, Epochs, OptimizerConfig, PhaseConfig, RunConfig
from nsp.family.signature import Range
from nsp.family.small_runs import RECONSTRUCTION, TEXT_ENCODER, smoke_run
from nsp.raster.vq_config import VqConfig

Size = Literal["GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-XXXL", "GPT-1B", "GPT-3B", "GPT-7B"]
PatchLevel = Annotated[int, "Levels of patches; the first is 2^(L-1) codes wide.", Range(1, 8)]
EpochRate = Annotated[
    float, "End of every level over that of the next one.", Range(0, 1, is_open=True)
]


def imagenet(
    *,
    data_path: Annotated[str | None, "Folder of pictures in class folders (--data)."] = None,
    code_path: Annotated[str | None, "Folder of codes, in place of pictures."] = None,
    vq_ckpt: Annotated[Path | None, "Tokenizer: a published file or a checkpoint folder."] = None,
    gpt_ckpt: Annotated[Path | None, "Transformer to go on with, of the same kinds."] = None,
    gpt_model: Annotated[Size, "Size of the transformer."] = "GPT-B",
    image_size: Annotated[int, "Side of the pictures in pixels.", Range(16)] = 256,
    downsample_size: Annotated[int, "Pixels per code: 16, or 8.", Range(8, 16)] = 16,
    num_classes: Annotated[int, "Classes of the pictures.", Range(1)] = 1000,
    patch_level: PatchLevel = 2,
    epoch_rate: EpochRate = 0.5,
    epochs: Annotated[int, "Epochs of all levels together.", Range(1)] = 300,
    scheduler: Annotated[bool, "Warm up and decay the rate in every level."] = False,
    ema: Annotated[bool, "Publish a moving average of the weights."] = False,
    cloud_save_path: Annotated[Path | None, "Folder for a second copy of saved steps."] = None,
    compile: Annotated[bool | None, "Use torch.compile; by default on a GPU."] = None,
    start_from: Annotated[str | None, "Checkpoint folder with all weights."] = None,
) -> RunConfig:
    """Return the public trainer's run for class-conditional models; options have its names.

    Without a trained tokenizer the run begins with that phase, which needs pictures.
    """
    if code_path is not None and data_path is not None:
        raise ConfigError(
            f"--code-path {code_path} and --data-path {data_path}: a run learns from one of them; "
            "omit --data-path to learn from codes"
        )
    if image_size % downsample_size or downsample_size not in (8, 16):
        raise ConfigError(
            f"--image-size {image_size} and --downsample-size {downsample_size}: the latter is 8 "
            "or 16, and the former a multiple of it"
        )
    model = dataclasses.replace(
        published(gpt_model.removeprefix("GPT-"), grid_side=image_size // downsample_size),
        vq=_vq_of(vq_ckpt, VQ_16 if downsample_size == 16 else VQ_8),
        condition=ClassCondition(num_classes=num_classes),
        pretrained_vq=None if vq_ckpt is None else str(vq_ckpt),
        pretrained_gpt=None if gpt_ckpt is None else str(gpt_ckpt),
    )
    optimizer = OptimizerConfig(
        lr=1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        schedule="wsd" if scheduler else "constant",
        warmup_steps=Epochs(epochs=1) if scheduler else 0,
        warmup_start=0.0,
        final_ratio=0.1,
        grad_clip=1.0,
    )
    tokenizer = PhaseConfig(
        name="tokenizer",
        steps=Epochs(epochs=40),
        batch_size=128,
        optimizer=dataclasses.replace(optimizer, schedule="constant", warmup_steps=0),
        sample_every=Epochs(epochs=1),
        checkpoint_every=Epochs(epochs=1),
        validate_every=Epochs(epochs=1),
        log_every=100,
    )
    predictor = PhaseConfig(
        name="predictor",
        steps=Epochs(epochs=epochs),
        batch_size=256,
        optimizer=optimizer,
        ema_decay=0.9999 if ema else 0.0,
        objective={"patch_level": patch_level, "epoch_rate": epoch_rate, "rates_per_level": True},
        sample_every=Epochs(epochs=10),
        checkpoint_every=Epochs(epochs=1),
        validate_every=Epochs(epochs=1),
        log_every=100,
    )
    return RunConfig(
        family="next_patch",
        model=model.to_dict(),
        data=DataConfig(source=code_path or data_path or "emoji", num_workers=8),
        phases=(tokenizer, predictor) if vq_ckpt is None and start_from is None else (predictor,),
        sampling={"guidance_scale": 2.0},
        copy_dir=None if cloud_save_path is None else str(cloud_save_path),
        start_from=start_from,
        compile=compile,
    )


def _vq_of(place: Path | None, usual: VqConfig) -> VqConfig:
    """Return the sizes of the tokenizer in a checkpoint folder, or the usual ones."""
    if place is None or not is_checkpoint(place):
        return usual
    record = read_checkpoint(place)
    if "vq" not in record.config:
        raise ConfigError(
            f"--vq-ckpt {place} is of family {record.family.name}, without such a tokenizer"
        )
    return VqConfig.from_dict(record.config["vq"])


def emoji(*, patch_level: PatchLevel = 2, epoch_rate: EpochRate = 0.5) -> RunConfig:
    """Return a run from captions to emoji, from the embedded set, sized for two CPU cores."""
    tokenizer = PhaseConfig(
        name="tokenizer",
        steps=1000,
        batch_size=32,
        optimizer=RECONSTRUCTION,
        sample_every=500,
    )
    predictor = PhaseConfig(
        name="predictor",
        steps=2000,
        batch_size=16,
        optimizer=OptimizerConfig(
            lr=1e-3,
            weight_decay=0.05,
            schedule="wsd",
            warmup_steps=100,
            warmup_start=0.0,
            final_ratio=0.05,
            grad_clip=1.0,
        ),
        ema_decay=0.99,
        objective={"patch_level": patch_level, "epoch_rate": epoch_rate},
        sample_every=1000,
    )
    return RunConfig(
        family="next_patch",
        model=SIZES["emoji"].to_dict(),
        text_encoder=dict(TEXT_ENCODER),
        phases=(tokenizer, predictor),
        sampling={"guidance_scale": 2.0, "top_k": 1},
    )


def smoke() -> RunConfig:
    """Return a run of seconds, for tests: the tiny model, two phases of four steps."""
    return smoke_run(emoji(patch_level=1), SIZES["tiny"])


RECIPES: Mapping[str, Callable[..., RunConfig]] = {
    "next_patch": imagenet,
    "next_patch_emoji": emoji,
    "next_patch_smoke": smoke,
}
