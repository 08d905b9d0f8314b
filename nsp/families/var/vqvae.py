"""The multi-scale VQVAE: CNN encoder, residual quantizer, CNN decoder.

Axes: B batch, C latent channels, H W pixels, h w latent grid, L tokens of one scale. Module and
parameter names are the published state-dict names.
Source: github.com/FoundationVision/VAR, models/vqvae.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nsp.families.var.config import VaeConfig
from nsp.families.var.quantizer import MultiScaleQuantizer
from nsp.layers.vqgan import Decoder, Encoder


class VQVAE(nn.Module):
    """Image <-> token maps of every scale.

    Trained with `objective.TokenizerObjective`; at inference only `quantize` and `decode` are used.
    """

    def __init__(self, config: VaeConfig, patch_nums: Sequence[int]) -> None:
        super().__init__()
        kernel, channels = config.quant_conv_kernel, config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(config, patch_nums)
        self.quant_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def encode(self, image: Tensor) -> Tensor:
        """Return the latent f (B,C,h,w) of `image` (B,3,H,W) in [-1,1], before quantization."""
        latent: Tensor = self.quant_conv(self.encoder(image))
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Return the image (B,3,H,W) of `latent`, not clamped."""
        image: Tensor = self.decoder(self.post_quant_conv(latent))
        return image

    @torch.no_grad()
    def tokenize(self, image: Tensor) -> list[Tensor]:
        """Return the tokens (B,L) int64 of every scale."""
        return self.quantize.tokenize(self.encode(image).float())[0]
