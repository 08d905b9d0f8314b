"""Pictures generated while training, through the same loop and stages that are deployed."""

import numpy as np
from numpy.typing import NDArray

from nsp.data.dataset import ImageDataset
from nsp.data.preview import preview
from nsp.data.stream import ShardStream
from nsp.families.next_scale.system import NextScaleSystem
from nsp.family.registry import family
from nsp.pipeline.pipeline import torch_pipeline
from nsp.pipeline.results import to_uint8

_SHEET_PIXELS = 24 * 64 * 64  # of all pictures of a sheet together
_FEWEST_SAMPLES = 4


def sample_grid(
    system: NextScaleSystem,
    data: ImageDataset | ShardStream,
    seed: int,
    guidance_scale: float,
    *,
    last_scale: int,
) -> tuple[NDArray[np.uint8], list[str]]:
    """Return pictures (N, H, W, 3) after `last_scale`, and their captions from the data."""
    side = system.config.sides[last_scale] * system.config.vae.downsampling
    count = min(24, max(_FEWEST_SAMPLES, _SHEET_PIXELS // side**2))
    titles = [item["caption"] for item in preview(data, count, seed=seed)]
    device = str(next(system.parameters()).device)
    pipeline = torch_pipeline(family("next_scale"), system, device=device)
    steps = pipeline.stream(prompts=titles, seed=seed, guidance_scale=guidance_scale)
    step = next(each for each in steps if each.scale == last_scale)
    return to_uint8(step.decode()), titles
