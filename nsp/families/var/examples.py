"""What to generate for a reference: real conditions that together call every stage of `var`."""

from collections.abc import Mapping
from typing import Any

from nsp.families.var.config import TextCondition, VarConfig
from nsp.families.var.io import needs_nucleus_stages

# Enough tokens for 99 % to mean something with a small model; few images where each is expensive.
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


def examples(config: VarConfig) -> list[Mapping[str, Any]]:
    """Return what to generate for a reference: arguments of `Pipeline.generate`.

    One batch with the model's own settings, one image without guidance and one with `more_smooth`:
    together they call every stage and both relations of rows to images.
    """
    wanted = -(-_WANTED_TOKENS // config.num_tokens)
    count = min(max(wanted, _FEWEST_IMAGES), _MOST_IMAGES)
    requests: list[Mapping[str, Any]] = [
        _conditions(config, count - 1),
        {**_conditions(config, 1), "guidance_scale": 1.0},
        {**_conditions(config, 1), "more_smooth": True},
    ]
    if needs_nucleus_stages(config, "delta"):  # TensorRT has stages of its own for top-p alone
        alone = {**_conditions(config, 1), "top_k": 0, "top_p": 0.9}
        requests += [alone, {**alone, "more_smooth": True}]
    return requests


def _conditions(config: VarConfig, count: int) -> dict[str, Any]:
    """Return `count` real conditions: captions, or spread-out classes."""
    if isinstance(config.condition, TextCondition):
        prompts = [PARITY_PROMPTS[i % len(PARITY_PROMPTS)] for i in range(count)]
        return {"prompts": prompts}
    classes = config.num_classes
    return {"class_ids": [(i * classes) // count for i in range(count)]}
