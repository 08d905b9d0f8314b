"""The image tokenizer with one code per cell: CNN encoder, codebook, CNN decoder.

Axes: B batch, Z width of a code vector, h w grid, N = h*w codes in raster order, V codes.
Source: arXiv:2012.09841 and github.com/FoundationVision/LlamaGen, tokenizer/tokenizer_image.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.layers.attention import l2_normalize
from nsp.layers.vqgan import Decoder, Encoder
from nsp.raster.vq_config import VqConfig

_ROWS = 8192  # latents compared with all codes at once: 0.5 GB for 16,384 codes


@dataclass(frozen=True)
class Quantized:
    """The result of quantizing latents in training."""

    latent: Tensor  # (B, Z, h, w) code vectors, with the gradient of the latents
    codes: Tensor  # (B, N)
    codebook_loss: Tensor  # scalar: moves codes to latents
    commitment_loss: Tensor  # scalar: moves latents to codes, without its weight


class Codebook(nn.Module):
    """Code vectors and the search for the nearest one, in float32; ties go to the lowest index."""

    MEASURED_BUFFERS = ("usage_V",)  # counted in training, not computed

    usage_V: Tensor

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        self.is_normalised = config.is_normalised
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_width)
        self.register_buffer("usage_V", torch.zeros(config.codebook_size))

    def table(self) -> Tensor:
        """Return the code vectors (V, Z) as they are compared and looked up."""
        weight = self.embedding.weight.float()
        return l2_normalize(weight) if self.is_normalised else weight

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors (..., Z) of codes."""
        return F.embedding(codes, self.table())

    @torch.no_grad()
    def nearest(self, latents_MZ: Tensor) -> Tensor:
        """Return the nearest codes (M,)."""
        table_VZ = self.table()
        lengths_V = table_VZ.square().sum(1)
        found = [(lengths_V - 2 * rows @ table_VZ.T).argmin(1) for rows in latents_MZ.split(_ROWS)]
        return torch.cat(found)

    def forward(self, latent_BZhw: Tensor) -> Quantized:
        """Return the code vectors nearest to the latents, straight through, and both losses."""
        with torch.autocast(latent_BZhw.device.type, enabled=False):  # it would move near ties
            rows_BhwZ = latent_BZhw.float().movedim(1, -1)
            if self.is_normalised:
                rows_BhwZ = l2_normalize(rows_BhwZ)
            codes = self.nearest(rows_BhwZ.detach().flatten(0, 2))
            vectors = self.lookup(codes).reshape(rows_BhwZ.shape)
            straight = rows_BhwZ + (vectors - rows_BhwZ).detach()
            return Quantized(
                straight.movedim(-1, 1),
                codes.reshape(len(latent_BZhw), -1),
                F.mse_loss(vectors, rows_BhwZ.detach()),
                F.mse_loss(rows_BhwZ, vectors.detach()),
            )


class VqTokenizer(nn.Module):
    """Image <-> codes."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_width, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_width, config.latent_channels, 1)

    def encode(self, image: Tensor) -> Tensor:
        """Return the latents (B, Z, h, w) of `image` (B, 3, H, W) in [-1, 1], not quantized."""
        latent: Tensor = self.quant_conv(self.encoder(image))
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Return the image (B, 3, H, W), not clamped, of code vectors (B, Z, h, w)."""
        image: Tensor = self.decoder(self.post_quant_conv(latent))
        return image

    @torch.no_grad()
    def tokenize(self, image: Tensor) -> Tensor:
        """Return the codes (B, N) int64 of `image` (B, 3, H, W) in [-1, 1]."""
        codes: Tensor = self.quantize(self.encode(image)).codes
        return codes

    @torch.no_grad()
    def rebuilt(self, image: Tensor) -> Tensor:
        """Return the image (B, 3, H, W), not clamped, that the codes of `image` keep."""
        return self.decode(self.quantize(self.encode(image)).latent)
