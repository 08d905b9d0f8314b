"""What to generate for a reference: real conditions that together call every stage of `var`."""

from dataclasses import replace

from nsp.families.var.config import TextCondition, VarConfig
from nsp.families.var.sampling import VarSampling
from nsp.families.var.stages import needs_nucleus_stages
from nsp.family.order import Order

# Enough tokens for a limit of 99 % with a small model; few images if each is expensive.
_WANTED_TOKENS, _FEWEST_IMAGES, _MOST_IMAGES = 1000, 3, 8

# Captions as in the embedded set: plain, compositional, with punctuation.
PARITY_PROMPTS = (
    "red apple",
    "woman firefighter medium-dark skin tone",
    "smiling cat with heart-eyes",
    "snow-capped mountain",
    "person in lotus position",
    "automobile",
    "flag: Japan",
    "two-hump camel",
)


def examples(config: VarConfig, sampling: VarSampling) -> list[list[Order[VarSampling]]]:
    """Return batches of orders that call every stage, with both relations of rows to images.

    One batch with the model's own settings, one image without guidance and one with `more_smooth`;
    two more draw by top-p alone where TensorRT has stages of its own for that.
    """
    wanted = -(-_WANTED_TOKENS // config.num_tokens)
    count = min(max(wanted, _FEWEST_IMAGES), _MOST_IMAGES)
    settings = [
        replace(sampling, guidance_scale=1.0),
        replace(sampling, more_smooth=True),
    ]
    if needs_nucleus_stages(config, "delta"):
        alone = replace(sampling, top_k=0, top_p=0.9)
        settings += [alone, replace(alone, more_smooth=True)]
    conditions = _conditions(config, count - 1)
    return [
        [Order(each, seed, sampling) for seed, each in enumerate(conditions)],
        *([Order(conditions[0], seed, each)] for seed, each in enumerate(settings)),
    ]


def _conditions(config: VarConfig, count: int) -> list[str | int]:
    """Return `count` real conditions: captions, or spread-out classes."""
    if isinstance(config.condition, TextCondition):
        return [PARITY_PROMPTS[i % len(PARITY_PROMPTS)] for i in range(count)]
    return [(i * config.num_classes) // count for i in range(count)]
