"""What to generate for a reference: prompts that together call every stage of `next_scale`."""

from dataclasses import replace

from nsp.families.next_scale.sampling import NextScaleSampling
from nsp.family.order import Order

PARITY_PROMPTS = (
    "red apple",
    "woman firefighter medium-dark skin tone",
    "a beautiful landscape with mountains and a lake",
    "automobile",
)


def examples(sampling: NextScaleSampling) -> list[list[Order[NextScaleSampling]]]:
    """Return batches of orders: guided and unguided, with and without a prompt."""
    plain = replace(sampling, guidance_scale=1.0)
    return [
        [Order(each, seed, sampling) for seed, each in enumerate(PARITY_PROMPTS[:2])],
        [Order(prompt, 1, plain) for prompt in (PARITY_PROMPTS[2], "")],
    ]
