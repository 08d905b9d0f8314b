"""What small runs share: settings for the embedded set, shorter runs, and runs of seconds."""

import dataclasses
from collections.abc import Mapping

from nsp.config import ModelConfig
from nsp.family.recipe import OptimizerConfig, RunConfig

# Of a new text encoder that learns the captions of the embedded set.
TEXT_ENCODER: Mapping[str, object] = {"vocab_size": 2048, "depth": 2, "num_heads": 4}
_TINY_ENCODER: Mapping[str, object] = {"vocab_size": 600, "depth": 1, "num_heads": 2}
# Of a phase that learns to reproduce its 64 px pictures.
RECONSTRUCTION = OptimizerConfig(
    lr=1e-3,
    weight_decay=0.0,
    schedule="cos",
    warmup_steps=100,
    final_ratio=0.02,
    grad_clip=1.0,
)


def shortened(run: RunConfig, steps: Mapping[str, int]) -> RunConfig:
    """Return the run with the phases named in `steps`; warm-up, average, samples in proportion."""
    phases = []
    for phase in run.phases:
        if phase.name not in steps:
            continue
        count = steps[phase.name]
        every = max(count // 3, 1)
        phases.append(
            dataclasses.replace(
                phase,
                steps=count,
                optimizer=dataclasses.replace(phase.optimizer, warmup_steps=max(count // 20, 1)),
                # A longer average would consist mostly of the first weights.
                ema_decay=min(phase.ema_decay, count / (count + 10)),
                sample_every=every,
                checkpoint_every=every,
            )
        )
    return dataclasses.replace(run, phases=tuple(phases))


def smoke_run(run: RunConfig, tiny: ModelConfig) -> RunConfig:
    """Return the run as a test of seconds: the tiny model, and every phase four steps long."""
    short = shortened(run, {phase.name: 4 for phase in run.phases})
    phases = tuple(
        dataclasses.replace(
            phase, batch_size=8, checkpoint_every=2, sample_every=2, validate_every=2, log_every=1
        )
        for phase in short.phases
    )
    return dataclasses.replace(
        short,
        model=tiny.to_dict(),
        text_encoder=dict(_TINY_ENCODER),
        phases=phases,
        anyway=True,  # four steps teach nothing
    )
