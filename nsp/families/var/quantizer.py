"""The multi-scale residual quantizer, all in float32.

Axes: B batch, C latent channels, p side of one scale, h side of the latent, L = p*p, V codes.
Source: arXiv:2404.02905 algorithms 1 and 2; github.com/FoundationVision/VAR, models/quant.py.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nsp.families.var.config import VaeConfig
from nsp.layers.resample import area_matrix, bicubic_matrix

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _in_float32(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return the method with autocast off, which would round products that decide tokens."""

    @functools.wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return method(*args, **kwargs)

    return run


class Phi(nn.Conv2d):
    """phi(x) = (1 - q) x + q conv3x3(x), the learned smoothing after bicubic upsampling."""

    bias: Tensor  # nn.Conv2d's type allows no bias

    def __init__(self, channels: int, strength: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.strength = abs(strength)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, h, h)."""
        return (1 - self.strength) * x + self.strength * super().forward(x)


class _SharedPhi(nn.Module):
    def __init__(self, phi: nn.Module) -> None:
        super().__init__()
        self.qresi = phi


class _PartialPhis(nn.Module):
    def __init__(self, phis: Sequence[nn.Module]) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(phis)


@dataclass(frozen=True)
class QuantizerOutput:
    """The results of one pass that tokenizer training needs."""

    latents: list[Tensor]  # straight-through f_hat of every scale: its value, the gradient of f
    loss: Tensor  # scalar VQ loss
    tokens: list[Tensor]  # per scale (B, L)


class MultiScaleQuantizer(nn.Module):
    """Codebook and phi convolutions; turns a latent into token maps and back."""

    MEASURED_BUFFERS = ("ema_vocab_hit_SV",)  # counted in training, not computed

    ema_vocab_hit_SV: Tensor

    def __init__(self, config: VaeConfig, patch_nums: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.patch_nums = tuple(patch_nums)
        self.phi_indices = config.phi_indices(len(self.patch_nums))
        self.embedding = nn.Embedding(config.vocab_size, config.latent_channels)
        self.quant_resi = self._make_phis()
        usage = torch.zeros(len(self.patch_nums), config.vocab_size)
        self.register_buffer("ema_vocab_hit_SV", usage)

    def _make_phis(self) -> nn.Module:
        """Return the phis in the container whose state-dict names the published models use."""
        config = self.config
        if abs(config.quant_resi) <= 1e-6:
            return nn.Identity()
        count = config.num_phis(len(self.patch_nums))
        phis = [Phi(config.latent_channels, config.quant_resi) for _ in range(count)]
        if config.share_quant_resi == 0:
            return nn.ModuleList(phis)
        return _SharedPhi(phis[0]) if config.share_quant_resi == 1 else _PartialPhis(phis)

    def phi(self, scale: int) -> nn.Module:
        """Return the phi of one scale."""
        phis = self.quant_resi
        if isinstance(phis, _SharedPhi):
            return phis.qresi
        if isinstance(phis, _PartialPhis):
            return phis.qresi_ls[self.phi_indices[scale]]
        if isinstance(phis, nn.ModuleList):
            return phis[self.phi_indices[scale]]
        return phis

    def nearest(self, z_NC: Tensor) -> Tensor:
        """Return the index (N,) of the nearest code of each vector, the first one on ties."""
        codes = self.embedding.weight
        if self.config.using_znorm:
            return (F.normalize(z_NC, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(-1)
        distance = z_NC.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z_NC @ codes.T
        return distance.argmin(-1)

    def upsample(self, codes_BLC: Tensor, scale: int) -> Tensor:
        """Return phi(bicubic(codes)) (B,C,h,h): what one scale adds to the latent."""
        side = self.patch_nums[scale]
        codes_BCpp = torch.unflatten(codes_BLC.transpose(1, 2), 2, (side, side))
        resized = self._resize(codes_BCpp, bicubic_matrix(side, self.patch_nums[-1]))
        smoothed: Tensor = self.phi(scale)(resized)
        return smoothed

    def downsample(self, latent_BChw: Tensor, scale: int) -> Tensor:
        """Return the latent averaged to the grid of `scale`, row-major: (B, L, C)."""
        matrix = area_matrix(self.patch_nums[-1], self.patch_nums[scale])
        return self._resize(latent_BChw, matrix).flatten(2).transpose(1, 2)

    @staticmethod
    def _resize(x_BChw: Tensor, matrix: NDArray[np.float32]) -> Tensor:
        M = torch.tensor(matrix, dtype=x_BChw.dtype, device=x_BChw.device)
        return M @ x_BChw @ M.T

    @_in_float32
    def tokenize(self, latent_BChw: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return per scale the tokens (B, L) and the accumulated reconstruction f_hat (B,C,h,h)."""
        rest, latent = latent_BChw, torch.zeros_like(latent_BChw)
        tokens, latents = [], []
        for scale in range(len(self.patch_nums)):
            z_BLC = self.downsample(rest, scale)
            index_BL = self.nearest(z_BLC.detach().flatten(0, 1)).view(z_BLC.shape[:2])
            added = self.upsample(self.embedding(index_BL), scale)
            latent = latent + added
            rest = rest - added.detach()
            tokens.append(index_BL)
            latents.append(latent)
        return tokens, latents

    @_in_float32
    def forward(self, latent_BChw: Tensor) -> QuantizerOutput:
        """Return the straight-through latents, the VQ loss and the tokens of `latent_BChw`.

        loss = mean over scales of beta mse(sg(f_hat_s), f) + mse(f_hat_s, sg(f)).
        """
        f = latent_BChw.float()
        tokens, latents = self.tokenize(f)
        loss = torch.stack(
            [
                self.config.commitment_weight * F.mse_loss(f_hat.detach(), f)
                + F.mse_loss(f_hat, f.detach())
                for f_hat in latents
            ]
        ).mean()
        return QuantizerOutput([f + (f_hat - f).detach() for f_hat in latents], loss, tokens)

    @_in_float32
    def teacher_input(self, tokens: Sequence[Tensor]) -> Tensor:
        """Return the transformer's input (B, L, C) for the scales after the first.

        `tokens` (B, L_s) are those of scales 0 .. s-1 for an input of scales 1 .. s: at most all
        but the last.
        """
        latent: Tensor | int = 0
        maps = []
        for scale, index_BL in enumerate(tokens):
            latent = latent + self.upsample(self.embedding(index_BL), scale)
            maps.append(self.downsample(latent, scale + 1))
        return torch.cat(maps, 1)
