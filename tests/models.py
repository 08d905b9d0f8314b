"""Builds small models for tests."""

from pathlib import Path

from nsp.families.var.config import VarConfig
from nsp.families.var.stages import stages
from nsp.stage.io import StageIO

CAPTIONS = (
    "red apple",
    "green apple",
    "woman firefighter medium-dark skin tone",
    "smiling cat with heart-eyes",
    "snow-capped mountain",
    "person in lotus position",
)


def new_tiny_checkpoint(
    folder: Path, *, seed: int = 0, null: str = "learned", greedy: bool = False
) -> Path:
    """Write a text-conditional model of the tiny size to `folder` and return it.

    If `greedy`, its own sampling settings are the bundled model's.

    The published initialisation makes logits almost constant; larger weights make parity mean
    something.
    """
    import dataclasses

    import torch

    from nsp.artifacts.systems import save_checkpoint
    from nsp.data.sources import ImageSource, Sample
    from nsp.families.var.config import SIZES
    from nsp.families.var.learn import VarLearner
    from nsp.text.parts import TextEncoderSettings

    torch.manual_seed(seed)
    config = SIZES["tiny"]
    config = dataclasses.replace(config, condition=dataclasses.replace(config.condition, null=null))
    samples = tuple(Sample(name=c, captions=(c,), class_id=None) for c in CAPTIONS)
    source = ImageSource(samples, (), ())
    text_encoder = TextEncoderSettings(vocab_size=560, depth=1, num_heads=2)
    system = VarLearner().new_system(config, text_encoder, source)
    with torch.no_grad():
        system.predictor.head.weight.mul_(100)
        for block in system.predictor.blocks:
            block.ada_lin[1].weight.mul_(10)
    sampling = {"top_k": 1} if greedy else {}
    save_checkpoint(folder, system, notes={"made_by": "tests"}, sampling=sampling)
    return folder


def stages_io(config: VarConfig, kv_layout: str, dtype: str) -> dict[str, StageIO]:
    """Return the tensors of every stage of a `var` model."""
    return {name: stage.io for name, stage in stages(config, kv_layout, dtype).items()}
