"""The sizes at which stages of the family `var` run, and real inputs to check them with."""

from collections.abc import Mapping, Sequence
from typing import Any

from nsp.families.var.config import TextCondition, VarConfig
from nsp.families.var.io import needs_nucleus_stages
from nsp.family.sampling import SamplingConfig
from nsp.stage.io import Sizes

# For tracing: all different and at least 2, since 0 and 1 are taken for constants; rows G may not
# be fewer than images B.
TRACE_SIZES: Sizes = {
    **{"B": 3, "G": 6, "N": 4, "L": 9, "P": 5, "R": 7},
    **{"p": 10, "q": 11, "r": 14, "c": 15},
}

# Enough tokens for 99 % to mean something with a small model; few images where each is expensive.
_WANTED_TOKENS, _FEWEST_IMAGES, _MOST_IMAGES = 1000, 3, 8

_SCALE_STAGES = ("step", "select", "select_smooth", "accumulate")

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


def stage_profiles(
    config: VarConfig,
    sampling: SamplingConfig,
    *,
    max_batch: int,
    static_batch: bool,
    max_ranks: int,
) -> dict[str, tuple[Sequence[Sizes], ...]]:
    """Return the profiles of every stage: for each the sizes it spans, the best for last.

    Stages of the scale loop have one profile per scale, the others one. Batches of 1 to `max_batch`
    images fit, with guidance (G = 2B rows) or without (G = B); with `static_batch` only full ones
    with guidance do. R goes up to `max_ranks` and is best at what `sampling`, the model's own
    settings, takes. The selections without sorting for top-p have one profile over all scales:
    each takes as much room as ten of the others.
    """
    scales = _scale_sizes(config)
    profiles: dict[str, tuple[Sequence[Sizes], ...]] = {}
    most_ranks = min(max_ranks, config.vae.vocab_size)
    prompts = max_batch + (config.text is not None and config.text.null == "empty_prompt")
    high = {"B": max_batch, "G": 2 * max_batch, "N": prompts, "R": most_ranks}
    low = {"B": 1, "G": 1, "N": 1, "R": 1}
    if static_batch:
        low |= {"B": high["B"], "G": high["G"]}
    best = {**high, "R": min(sampling.num_ranks(config.vae.vocab_size), most_ranks)}
    for stage in ("text_encoder", "condition", *_SCALE_STAGES, "decoder"):
        if stage == "text_encoder" and config.text is None:
            continue
        steps = scales if stage in _SCALE_STAGES else [{}]
        profiles[stage] = tuple(
            [{**bound, **step} for bound in (low, high, best)] for step in steps
        )
    if needs_nucleus_stages(config, "delta"):
        lengths = [step["L"] for step in scales]
        spanned = [{**low, "L": min(lengths)}, {**high, "L": max(lengths)}]
        spanned.append({**high, "L": max(lengths), "R": 1})
        profiles |= {"select_nucleus": (spanned,), "select_smooth_nucleus": (spanned,)}
    return profiles


def _scale_sizes(config: VarConfig) -> list[dict[str, int]]:
    """Return tokens, past and grids of every scale; the first grid follows the last (loop.py)."""
    sides, sizes, past = config.patch_nums, [], 0
    for side, following in zip(sides, [*sides[1:], sides[0]], strict=True):
        grids = {"p": side, "q": side, "r": following, "c": following}
        sizes.append({"L": side**2, "P": past, **grids})
        past += side**2
    return sizes


def parity_requests(config: VarConfig) -> list[Mapping[str, Any]]:
    """Return what to generate for a reference: arguments of `Pipeline.generate`.

    One batch with the model's own settings, one image without guidance and one with `more_smooth`:
    together they call every stage and both relations of rows to images. Two more draw by top-p
    alone where TensorRT has stages of its own for that.
    """
    wanted = -(-_WANTED_TOKENS // config.num_tokens)
    count = min(max(wanted, _FEWEST_IMAGES), _MOST_IMAGES)
    requests: list[Mapping[str, Any]] = [
        _conditions(config, count - 1),
        {**_conditions(config, 1), "guidance_scale": 1.0},
        {**_conditions(config, 1), "more_smooth": True},
    ]
    if needs_nucleus_stages(config, "delta"):
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
