"""Pictures as the image tokenizer reconstructs them."""

import numpy as np
import torch
from numpy.typing import NDArray

from nsp.data.dataset import to_model_range
from nsp.families.var.system import VarSystem

_BATCH = 64  # pictures reconstructed at once


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
