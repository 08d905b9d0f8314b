"""The INL-VAE, module by module under the names of its published weights.

Axes: B images, C latent channels, h w latent grid, H W pixels.
Source: github.com/Web3-League/inl-diffusion, inl_diffusion/vae.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.families.inl_diffusion.config import ATTENTION_LEVEL, VaeConfig
from nsp.layers.applied import applied

_EPS = 1e-6


def _norm(config: VaeConfig, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, width, eps=_EPS)


class ResBlock(nn.Module):
    """x + conv2(swish(norm2(conv1(swish(norm1(x)))))); other widths need a 1x1 convolution of x."""

    def __init__(self, config: VaeConfig, num_in: int, num_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, num_in)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.norm2 = _norm(config, num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1)
        if num_in != num_out:
            self.skip = nn.Conv2d(num_in, num_out, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Return (B, C, h, w), in float32."""
        hidden = applied(self.conv1, F.silu(self.norm1(x_BChw))).float()
        hidden = applied(self.conv2, F.silu(self.norm2(hidden))).float()
        kept = applied(self.skip, x_BChw).float() if hasattr(self, "skip") else x_BChw
        return kept + hidden


class AttentionBlock(nn.Module):
    """x + attention among all cells."""

    def __init__(self, config: VaeConfig, width: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = _norm(config, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Return (B, C, h, w), in float32."""
        qkv = applied(self.qkv, self.norm(x_BChw)).flatten(2)
        q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x_BChw + applied(self.proj, mixed.reshape(x_BChw.shape)).float()


class Downsample(nn.Module):
    """Half the size, by a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Return (B, C, h/2, w/2)."""
        return applied(self.conv, x_BChw).float()


class Upsample(nn.Module):
    """Twice the size: nearest cells, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Return (B, C, 2h, 2w)."""
        return applied(self.conv, F.interpolate(x_BChw, scale_factor=2.0)).float()


def _level(config: VaeConfig, level: int, num_in: int, count: int) -> tuple[list[nn.Module], int]:
    """Return the blocks of one level, and their width."""
    width = config.base_channels * config.channel_multipliers[level]
    blocks: list[nn.Module] = []
    for _ in range(count):
        blocks.append(ResBlock(config, num_in, width))
        if level == ATTENTION_LEVEL:
            blocks.append(AttentionBlock(config, width))
        num_in = width
    return blocks, width


class _Half(nn.Module):
    """What encoder and decoder share: the middle blocks and the last convolution."""

    def _add_middle(self, config: VaeConfig, width: int) -> None:
        self.mid_block1 = ResBlock(config, width, width)
        self.mid_attn = AttentionBlock(config, width)
        self.mid_block2 = ResBlock(config, width, width)

    def _add_end(self, config: VaeConfig, width: int, num_out: int) -> None:
        self.norm_out = _norm(config, width)
        self.conv_out = nn.Conv2d(width, num_out, 3, padding=1)

    def _middle(self, x: Tensor) -> Tensor:
        result: Tensor = self.mid_block2(self.mid_attn(self.mid_block1(x)))
        return result

    def _end(self, x: Tensor) -> Tensor:
        return applied(self.conv_out, F.silu(self.norm_out(x))).float()


class Encoder(_Half):
    """A picture -> the mean and the logarithm of the variance of its latent."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        width = config.base_channels
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        blocks: list[nn.Module] = []
        last = len(config.channel_multipliers) - 1
        for level in range(last + 1):
            own, width = _level(config, level, width, config.num_res_blocks)
            blocks += own if level == last else [*own, Downsample(width)]
        self.down_blocks = nn.ModuleList(blocks)
        self._add_middle(config, width)
        self._add_end(config, width, 2 * config.latent_channels)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Return (B, 2C, h, w)."""
        x = applied(self.conv_in, image_B3HW).float()
        return self._end(self._middle(_through(self.down_blocks, x)))


class Decoder(_Half):
    """A latent -> a picture, about [-1, 1]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        width = config.base_channels * config.channel_multipliers[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self._add_middle(config, width)
        blocks: list[nn.Module] = []
        for level in reversed(range(len(config.channel_multipliers))):
            own, width = _level(config, level, width, config.num_res_blocks + 1)
            blocks += [*own, Upsample(width)] if level else own
        self.up_blocks = nn.ModuleList(blocks)
        self._add_end(config, width, 3)

    def forward(self, latent_BChw: Tensor) -> Tensor:
        """Return (B, 3, H, W)."""
        x = self._middle(applied(self.conv_in, latent_BChw).float())
        return self._end(_through(self.up_blocks, x))


def _through(blocks: Sequence[nn.Module] | nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class Vae(nn.Module):
    """Encoder, decoder and the factor of the latents."""

    latent_scale: Tensor

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.register_buffer("latent_scale", torch.tensor(config.latent_scale))

    def moments(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance (B, C, h, w) of pictures in [-1, 1], not scaled."""
        mean, log_variance = self.encoder(image_B3HW).chunk(2, 1)
        return mean, log_variance

    def encode(self, image_B3HW: Tensor, noise_BChw: Tensor | None = None) -> Tensor:
        """Return scaled latents (B, C, h, w) of pictures in [-1, 1]: their mean, or drawn."""
        mean, log_variance = self.moments(image_B3HW)
        if noise_BChw is not None:
            mean = mean + noise_BChw * (0.5 * log_variance).exp()
        return mean * self.latent_scale

    def decode(self, latent_BChw: Tensor) -> Tensor:
        """Return pictures (B, 3, H, W), about [-1, 1], of scaled latents."""
        result: Tensor = self.decoder(latent_BChw / self.latent_scale)
        return result
