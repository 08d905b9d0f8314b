"""What the scales learn: the latent of scale k is that of the picture resized, with antialiasing.

It has the size that the latent decodes to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nsp.data.dataset import to_model_range
from nsp.families.next_scale.system import NextScaleSystem
from nsp.training.latents import Encoding


def resized(image_B3HW: Tensor, side_px: int) -> Tensor:
    """Return float pictures at another side, bilinear with antialiasing."""
    if image_B3HW.shape[-1] == side_px:
        return image_B3HW
    return F.interpolate(
        image_B3HW, (side_px, side_px), mode="bilinear", align_corners=False, antialias=True
    )


@torch.no_grad()
def encode_scales(system: NextScaleSystem, image_B3HW: Tensor) -> list[Tensor]:
    """Return the latents (B, C, s_k, s_k) of uint8 pictures at every scale."""
    pixels = system.config.vae.downsampling
    image = to_model_range(image_B3HW)
    # Also inside a training step: half types would give other latents than the cached ones, and
    # the values of SDXL's encoder are too large for float16.
    with torch.autocast(image.device.type, enabled=False):
        return [
            system.vae.encode(resized(image, side * pixels)).float() for side in system.config.sides
        ]


def encoding(system: NextScaleSystem) -> Encoding:
    """Return how pictures become latents; the decoder does not decide them."""
    return Encoding(
        system.vae,
        lambda image: encode_scales(system, image),
        about=(system.config.vae, system.config.sides),
        decides=lambda name: ".decoder." not in name and "post_quant" not in name,
    )
