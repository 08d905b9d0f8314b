"""Training runs of the family `var`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.repair import DEMO
from nsp.errors import ConfigError
from nsp.families.var.config import SIZES
from nsp.family.recipe import OptimizerConfig, PhaseConfig, RunConfig
from nsp.family.signature import PlannedAs
from nsp.family.small_runs import RECONSTRUCTION, TEXT_ENCODER, shortened, smoke_run

FINETUNE_STEPS = 400  # of the transformer: with the decoder four minutes of one CPU core


def emoji() -> RunConfig:
    """Return the default run: text to emoji, from the embedded set, sized for two CPU cores."""
    tokenizer = PhaseConfig(
        name="tokenizer",
        steps=3600,
        batch_size=32,
        optimizer=RECONSTRUCTION,
        objective={"prefix_share": 0.5},
        sample_every=1200,
    )
    # All 130 tokens of a picture take six times as long as the 30 of its first four scales, which
    # decide its content. Batches are small because with 3,584 pictures the number of updates
    # matters.
    prefixes = [{"num_scales": 4, "share": 0.2}, {"num_scales": 5, "share": 0.3}]
    predictor = PhaseConfig(
        name="predictor",
        steps=20_000,
        batch_size=16,
        optimizer=OptimizerConfig(
            lr=1e-3,
            weight_decay=0.03,
            schedule="lin0",
            warmup_steps=250,
            final_ratio=0.02,
            grad_clip=2.0,
        ),
        ema_decay=0.999,
        objective={"prefixes": prefixes},
        sample_every=2000,
    )
    decoder = PhaseConfig(
        name="decoder",
        steps=1500,
        batch_size=32,
        optimizer=dataclasses.replace(RECONSTRUCTION, lr=5e-4, warmup_steps=50),
        objective={"prefix_share": 0.15},
        sample_every=500,
    )
    return RunConfig(
        family="var",
        model=SIZES["emoji"].to_dict(),
        text_encoder=dict(TEXT_ENCODER),
        phases=(tokenizer, predictor, decoder),
        sampling={"guidance_scale": 2.0, "top_k": 1},
    )


def quick() -> RunConfig:
    """Return a run of a few minutes on two CPU cores: every part works, pictures are rough."""
    run = shortened(emoji(), {"tokenizer": 100, "predictor": 300, "decoder": 30})
    # After 100 steps the tokenizer is 2 dB better than a plain colour, which shows rough pictures.
    return dataclasses.replace(run, anyway=True)


def smoke() -> RunConfig:
    """Return a run of seconds, for tests: the tiny model at 16 px, two phases of four steps."""
    run = emoji()
    # The tiny model has fewer scales than the objectives name.
    phases = tuple(dataclasses.replace(phase, objective={}) for phase in run.phases[:2])
    return smoke_run(dataclasses.replace(run, phases=phases), SIZES["tiny"])


def finetune(
    *, start_from: Annotated[str, "Checkpoint folder with the weights to start from"] = str(DEMO)
) -> Annotated[RunConfig, PlannedAs(None)]:  # it reads the checkpoint's model
    """Return a run of minutes on own pictures: a trained model's decoder and transformer learn.

    The prompt tokenizer stays, and so do the encoder and the codes of the image tokenizer. The
    decoder comes first, so that the pictures that judge the transformer are drawn with it.
    """
    record = read_checkpoint(Path(start_from))
    if record.family.name != "var":
        raise ConfigError(
            f"--preset finetune is for models of family var, but {start_from} is of family "
            f"{record.family.name}; give --config with the run that made it"
        )
    run = shortened(emoji(), {"predictor": FINETUNE_STEPS, "decoder": FINETUNE_STEPS // 5})
    predictor, decoder = (
        dataclasses.replace(each, batch_size=16, sample_every=each.steps) for each in run.phases
    )
    return RunConfig(
        family="var",
        model=dict(record.config),
        phases=(decoder, predictor),
        sampling=dict(record.sampling),
        start_from=start_from,
    )


RECIPES: Mapping[str, Callable[..., RunConfig]] = {
    "emoji": emoji,
    "quick": quick,
    "finetune": finetune,
    "smoke": smoke,
}
