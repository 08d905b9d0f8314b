"""The stages that draw codes, and the decoder, as torch modules; axes as in stages.py."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from nsp.layers.logits import (
    apply_guidance,
    filter_by_mass,
    filter_by_rank,
    sample_by_inverse_cdf,
)
from nsp.raster.vq import VqTokenizer

# Scaled logits, top-p, top-k, ranks -> filtered logits.
Filter: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
NUM_DRAW = 10  # inputs of a draw, beside logits


def draw(
    logits_G1V: Tensor,
    index: Tensor,
    codes_BN: Tensor,
    uniforms_B1: Tensor,
    forced_B1: Tensor,
    guidance_B: Tensor,
    temperature_B: Tensor,
    top_p_B: Tensor,
    top_k_B: Tensor,
    ranks_R: Tensor,
    rows_G: Tensor,
    *,
    keep: Filter = filter_by_rank,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, next, new_codes, guided; all in float32."""
    guided = apply_guidance(logits_G1V, guidance_B)
    scaled = guided / temperature_B.reshape(-1, 1, 1)
    tokens = sample_by_inverse_cdf(keep(scaled, top_p_B, top_k_B, ranks_R), uniforms_B1)
    taken = torch.where(forced_B1 >= 0, forced_B1, tokens)
    here_N = torch.arange(codes_BN.shape[1], device=codes_BN.device) == index
    return tokens, taken[:, 0].index_select(0, rows_G), torch.where(here_N, taken, codes_BN), guided


def filter_where_asked(x_BLV: Tensor, top_p_B: Tensor, top_k_B: Tensor, ranks_R: Tensor) -> Tensor:
    """Return the same as `filter_by_rank`; a graph skips it if no row has top-k or top-p.

    TensorRT's engines would have two branches to build for every size.
    """
    if not torch.compiler.is_exporting():  # torch would compile both branches before the first run
        return filter_by_rank(x_BLV, top_p_B, top_k_B, ranks_R)
    is_asked = ((top_k_B > 0) | (top_p_B < 1)).any()
    settings = (x_BLV, top_p_B, top_k_B, ranks_R)
    filtered: Tensor = torch.cond(is_asked, filter_by_rank, _unfiltered, settings)
    return filtered


def _unfiltered(x_BLV: Tensor, *_: Tensor) -> Tensor:
    return x_BLV.clone()


class NucleusStage(nn.Module):
    """Logits -> the code drawn by top-p without sorting."""

    def forward(self, logits_G1V: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return tokens, next, new_codes, guided."""
        return draw(logits_G1V, *inputs, keep=filter_by_mass)


class DecoderStage(nn.Module):
    """Codes -> pixels."""

    def __init__(self, vq: VqTokenizer) -> None:
        super().__init__()
        self.vq = vq

    def forward(self, codes_Bhw: Tensor) -> tuple[Tensor]:
        """Return the image (B, 3, H, W), about [0, 1]; a missing code (-1) is a cell of zeros.

        It is clipped by those who make pixels: the public code resizes pictures before that.
        """
        vectors_BhwZ = self.vq.quantize.lookup(codes_Bhw.clamp_min(0))
        vectors_BhwZ = torch.where((codes_Bhw >= 0)[..., None], vectors_BhwZ, 0.0)
        latent_BZhw = vectors_BhwZ.permute(0, 3, 1, 2)
        image = self.vq.decode(latent_BZhw.to(self.vq.post_quant_conv.weight.dtype))
        return ((image.float() + 1) * 0.5,)
