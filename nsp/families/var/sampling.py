"""Pictures generated while training, through the same loop and stages that are deployed."""

import numpy as np
from numpy.typing import NDArray

from nsp.data.dataset import ImageDataset
from nsp.families.registry import family
from nsp.families.var.system import VarSystem
from nsp.runtime.pipeline import torch_pipeline

_NUM_SAMPLES = 24


def sample_grid(
    system: VarSystem, data: ImageDataset, seed: int, guidance_scale: float
) -> tuple[NDArray[np.uint8], list[str]]:
    """Return greedy samples (N, H, W, 3) and their captions; `seed` picks these from the data."""
    rng = np.random.default_rng(seed)
    picks = rng.choice(len(data), size=min(_NUM_SAMPLES, len(data)), replace=False)
    samples = [data.source.samples[int(i)] for i in picks]
    device = str(next(system.parameters()).device)
    pipeline = torch_pipeline(family("var"), system, device=device)
    titles = [sample.caption for sample in samples]
    if system.config.text is None:
        ids = [int(sample.class_id) for sample in samples if sample.class_id is not None]
        result = pipeline.generate(class_ids=ids, seed=seed, guidance_scale=guidance_scale, top_k=1)
    else:
        result = pipeline.generate(
            prompts=titles, seed=seed, guidance_scale=guidance_scale, top_k=1
        )
    return result.images, titles
