"""Pictures generated while training, through the same loop and stages that are deployed."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nsp.data.dataset import ImageDataset, to_model_range
from nsp.data.preview import preview
from nsp.data.stream import ShardStream
from nsp.families.var.system import VarSystem
from nsp.family.registry import family
from nsp.pipeline.pipeline import torch_pipeline

_NUM_SAMPLES = 24
_BATCH = 64  # pictures reconstructed at once


def sample_grid(
    system: VarSystem, data: ImageDataset | ShardStream, seed: int, guidance_scale: float
) -> tuple[NDArray[np.uint8], list[str]]:
    """Return greedy samples (N, H, W, 3) and their captions, chosen from the data by `seed`."""
    items = preview(data, _NUM_SAMPLES, seed=seed)
    titles = [item["caption"] for item in items]
    conditions: dict[str, Any] = {"prompts": titles}
    if system.config.text is None:
        conditions = {"class_ids": [item["class_id"] for item in items]}
    device = str(next(system.parameters()).device)
    pipeline = torch_pipeline(family("var"), system, device=device)
    result = pipeline.generate(**conditions, seed=seed, guidance_scale=guidance_scale, top_k=1)
    return result.images, titles


@torch.no_grad()
def reconstruct(system: VarSystem, pictures_BHW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pictures (B, H, W, 3) as the tokens of all scales keep them."""
    vae, rows = system.vae, []
    pictures_B3HW = torch.from_numpy(pictures_BHW3).movedim(-1, 1)
    for batch in torch.split(pictures_B3HW, _BATCH):
        latent = vae.encode(to_model_range(batch.to(next(vae.parameters()).device)))
        rebuilt = vae.decode(vae.quantize(latent).latents[-1])
        rows.append(((rebuilt.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(rows).movedim(1, -1).numpy()
