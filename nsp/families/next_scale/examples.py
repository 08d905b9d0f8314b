"""What to generate for a reference: prompts that together call every stage of `next_scale`."""

from collections.abc import Mapping
from typing import Any

from nsp.families.next_scale.config import NextScaleConfig

PARITY_PROMPTS = (
    "red apple",
    "woman firefighter medium-dark skin tone",
    "a beautiful landscape with mountains and a lake",
    "automobile",
)


def examples(config: NextScaleConfig) -> list[Mapping[str, Any]]:
    """Return what to generate for a reference: guided and unguided, with and without a prompt."""
    return [
        {"prompts": list(PARITY_PROMPTS[:2])},
        {"prompts": [PARITY_PROMPTS[2], ""], "guidance_scale": 1.0},
    ]
