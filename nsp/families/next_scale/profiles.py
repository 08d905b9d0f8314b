"""The sizes at which stages of the family `next_scale` run, and what parity is checked with."""

from collections.abc import Mapping, Sequence
from typing import Any

from nsp.families.next_scale.config import NextScaleConfig
from nsp.families.next_scale.io import stages_io
from nsp.family.sampling import SamplingConfig
from nsp.stage.io import Sizes

# For tracing: all different and at least 2, since 0 and 1 are taken for constants; rows G may not
# be fewer than images B.
TRACE_SIZES: Sizes = {"B": 3, "G": 6, "N": 4, "h": 10, "w": 11}

PARITY_PROMPTS = (
    "red apple",
    "woman firefighter medium-dark skin tone",
    "a beautiful landscape with mountains and a lake",
    "automobile",
)


def stage_profiles(
    config: NextScaleConfig,
    sampling: SamplingConfig,
    *,
    max_batch: int,
    static_batch: bool,
    max_ranks: int,
) -> dict[str, tuple[Sequence[Sizes], ...]]:
    """Return the profiles of every stage: for each the sizes it spans, the best for last.

    The decoder has one profile per scale, every other stage one. Batches of 1 to `max_batch` images
    fit, with guidance (G = 2B rows) or without (G = B); with `static_batch` only full ones with
    guidance do. Nothing is ranked, so `sampling` and `max_ranks` decide nothing.
    """
    high = {"B": max_batch, "G": 2 * max_batch, "N": max_batch}
    low = {"B": 1, "G": 1, "N": 1}
    if static_batch:
        low |= {"B": high["B"], "G": high["G"]}
    profiles: dict[str, tuple[Sequence[Sizes], ...]] = {}
    for stage in stages_io(config, "delta", "float32"):
        steps = [{"h": side, "w": side} for side in config.sides] if stage == "decoder" else [{}]
        profiles[stage] = tuple(
            [{**bound, **step} for bound in (low, high, high)] for step in steps
        )
    return profiles


def parity_requests(config: NextScaleConfig) -> list[Mapping[str, Any]]:
    """Return what to generate for a reference: guided and unguided, with and without a prompt."""
    return [
        {"prompts": list(PARITY_PROMPTS[:2])},
        {"prompts": [PARITY_PROMPTS[2], ""], "guidance_scale": 1.0},
    ]
