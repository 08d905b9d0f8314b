"""What to generate for a reference: orders that together call every stage of `inl_diffusion`."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nsp.families.inl_diffusion.config import InlConfig
from nsp.families.inl_diffusion.loop import CONTROL, INIT, MASK
from nsp.families.inl_diffusion.sampling import InlSampling
from nsp.family.order import Order

_PROMPTS = ("red apple", "woman firefighter medium-dark skin tone")
_STEPS = 4


def examples(config: InlConfig, sampling: InlSampling) -> Sequence[Sequence[Order[InlSampling]]]:
    """Return batches of orders: guided, plain, of a sampler with a past, and of one with noise."""
    guided = replace(
        sampling,
        num_inference_steps=_STEPS,
        guidance_scale=max(sampling.guidance_scale, 1.5),
    )
    others = (
        replace(guided, guidance_scale=1.0),
        replace(guided, sampler="unipc", guidance_rescale=0.5, guidance_end=0.5),
        replace(guided, sampler="euler_ancestral", guidance_scale=1.0),
    )
    rng, side = np.random.default_rng(0), config.image_size_px
    picture = rng.random((3, side, side), np.float32)
    mask = np.zeros((side, side), np.float32)
    mask[: side // 2] = 1
    part = replace(guided, strength=0.5)
    control = {CONTROL: rng.random((3, side, side), np.float32)} if config.control_depth else {}
    return [
        [Order(prompt, seed, guided, given=control) for seed, prompt in enumerate(_PROMPTS)],
        *([Order(_PROMPTS[0], seed, each, given=control)] for seed, each in enumerate(others)),
        [Order(_PROMPTS[1], 0, part, given={INIT: picture, MASK: mask, **control})],
    ]
