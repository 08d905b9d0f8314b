"""Training runs of the family `inl_diffusion`."""

import dataclasses
from collections.abc import Callable, Mapping

from nsp.families.inl_diffusion.config import SIZES
from nsp.family.recipe import OptimizerConfig, PhaseConfig, RunConfig

_VAE, _DIT = "vae", "dit"


def emoji() -> RunConfig:
    """Return text to emoji at 64 px from the embedded set, sized for two CPU cores."""
    vae = PhaseConfig(
        name=_VAE,
        steps=2000,
        batch_size=16,
        optimizer=OptimizerConfig(
            lr=1e-3,
            weight_decay=0.0,
            schedule="cos",
            warmup_steps=100,
            final_ratio=0.02,
            grad_clip=1.0,
        ),
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
        text_encoder={"vocab_size": 2048, "depth": 2, "num_heads": 4},
        phases=(vae, dit),
        sampling={"num_inference_steps": 20, "sampler": "dpmpp_2m", "guidance_scale": 3.0},
    )


def smoke() -> RunConfig:
    """Return a run of seconds, for tests: the tiny model, two phases of four steps."""
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
        anyway=True,  # four steps teach nothing
    )


RECIPES: Mapping[str, Callable[..., RunConfig]] = {
    "inl_diffusion": emoji,
    "inl_diffusion_smoke": smoke,
}
