"""The convolutional encoder and decoder of VQGAN, as image tokenizers of several families use them.

Axes: B batch, C latent channels, H W pixels, h w latent grid. Module and parameter names are those
of the VAR state dicts; other published ones differ by names alone.
Source: github.com/CompVis/taming-transformers, taming/modules/diffusionmodules/model.py (LDM's
vq-f16), and github.com/FoundationVision/VAR, models/basic_vae.py.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class Sizes(Protocol):
    """What the blocks read of a tokenizer's configuration."""

    @property
    def base_channels(self) -> int:
        """Width of the finest level."""

    @property
    def channel_multipliers(self) -> tuple[int, ...]:
        """Width of every level over that of the finest; each level halves the grid of the last."""

    @property
    def num_res_blocks(self) -> int:
        """Per encoder level; the decoder has one more."""

    @property
    def latent_channels(self) -> int:
        """C, of the encoder's output and the decoder's input."""

    @property
    def patch_size(self) -> int:
        """Pixels folded into channels before the finest level."""

    @property
    def norm_groups(self) -> int:
        """Groups of every normalisation."""

    @property
    def dropout(self) -> float:
        """Inside the residual blocks."""


class GroupNorm(nn.GroupNorm):
    """Group normalisation with statistics in float32, whatever the dtype of its input."""

    def __init__(self, config: Sizes, channels: int) -> None:
        super().__init__(config.norm_groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised tensor in the dtype of `x`."""
        normed: Tensor = super().forward(x.float())
        return normed.to(x.dtype)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, config: Sizes, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(config, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = GroupNorm(config, channels_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels_out, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        out: Tensor = self.nin_shortcut(x) + hidden
        return out


class AttnBlock(nn.Module):
    """x + proj(single-head attention over all positions of norm(x))."""

    def __init__(self, config: Sizes, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(config, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels, h, w)."""
        B, C, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, C, h * w).unbind(1)
        # The reference multiplies by C^-0.5 after the product; scaling q first keeps fp16 in range.
        scores = (q * C**-0.5).transpose(1, 2) @ k
        weights = scores.float().softmax(-1).to(x.dtype)
        mixed = (v @ weights.transpose(1, 2)).reshape(B, C, h, w)
        out: Tensor = x + self.proj_out(mixed)
        return out


class Downsample(nn.Module):
    """3x3 convolution of stride 2, zero-padded on the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels, h/2, w/2)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels, 2h, 2w)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """One resolution: residual blocks, attention after each at the lowest one."""

    def __init__(
        self, config: Sizes, channels_in: int, channels: int, num_blocks: int, *, lowest: bool
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels] * (num_blocks - 1)
        self.block = nn.ModuleList(ResBlock(config, width, channels) for width in widths)
        self.attn = nn.ModuleList(AttnBlock(config, channels) for _ in widths if lowest)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels, h, w)."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x


class DownLevel(Level):
    """A level of the encoder, which halves the grid at its end; the lowest one does not."""

    def __init__(self, config: Sizes, channels_in: int, channels: int, *, lowest: bool) -> None:
        super().__init__(config, channels_in, channels, config.num_res_blocks, lowest=lowest)
        self.downsample = nn.Identity() if lowest else Downsample(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels, h/2, w/2)."""
        out: Tensor = self.downsample(super().forward(x))
        return out


class UpLevel(Level):
    """A level of the decoder, which doubles the grid at its end; the finest one does not."""

    def __init__(
        self, config: Sizes, channels_in: int, channels: int, *, lowest: bool, finest: bool
    ) -> None:
        super().__init__(config, channels_in, channels, config.num_res_blocks + 1, lowest=lowest)
        self.upsample = nn.Identity() if finest else Upsample(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels, 2h, 2w)."""
        out: Tensor = self.upsample(super().forward(x))
        return out


def middle(config: Sizes, channels: int) -> nn.Sequential:
    """Return the blocks between encoder levels and latent."""
    mid = nn.Sequential()
    mid.add_module("block_1", ResBlock(config, channels, channels))
    mid.add_module("attn_1", AttnBlock(config, channels))
    mid.add_module("block_2", ResBlock(config, channels, channels))
    return mid


class Encoder(nn.Module):
    """Image (B,3,H,W) in [-1,1] -> features (B,C,h,w)."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(3 * config.patch_size**2, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            lowest = i == len(widths) - 1
            width_in = widths[i - 1] if i else config.base_channels
            self.down.append(DownLevel(config, width_in, width, lowest=lowest))
        self.mid = middle(config, widths[-1])
        self.norm_out = GroupNorm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, C, h, w)."""
        x = self.conv_in(F.pixel_unshuffle(image, self.patch_size))
        for level in self.down:
            x = level(x)
        features: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return features


class Decoder(nn.Module):
    """Latent (B,C,h,w) -> image (B,3,H,W), about [-1,1]."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = middle(config, widths[-1])
        # Index 0 is the finest level, as in the state dict; the forward pass starts from the last.
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            lowest = i == len(widths) - 1
            width_in = width if lowest else widths[i + 1]
            self.up.append(UpLevel(config, width_in, width, lowest=lowest, finest=i == 0))
        self.norm_out = GroupNorm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch_size**2, 3, padding=1)
        self.patch_size = config.patch_size

    def forward(self, latent: Tensor) -> Tensor:
        """Return (B, 3, H, W)."""
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch_size)
