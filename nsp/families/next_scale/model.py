"""The generator: a base that draws the first latent, and a predictor for every further scale.

Axes: B images or rows, C latent channels, W feature channels, D condition width, L tokens of this
scale, P cached tokens, H query heads, M heads of keys and values, K head width; h w is a latent's
grid. Modules compute in the dtype of their weights; latents keep the dtype they arrive in, and
norms, softmax and interpolation are float32.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.families.next_scale.config import NextScaleConfig
from nsp.layers.attention import KeyValue
from nsp.layers.resample import bilinear_matrix

_DENSE_LAYERS = 4  # of a residual dense block
_TIME_CHANNELS = 64


class ResidualDenseBlock(nn.Module):
    """Convolutions that each see all features before them, fused and added to the input.

    Source: Zhang et al. 2018, arXiv:1802.08797, section 3.2, without batch norm.
    """

    def __init__(self, width: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.layers = nn.ModuleList(
            nn.Conv2d(width + i * growth, growth, 3, padding=1) for i in range(_DENSE_LAYERS)
        )
        self.fusion = nn.Conv2d(width + _DENSE_LAYERS * growth, width, 1)

    def forward(self, x_BWhw: Tensor) -> Tensor:
        """Return (B, W, h, w)."""
        features = x_BWhw
        for layer in self.layers:
            added = F.dropout2d(F.gelu(layer(features)), self.dropout, self.training)
            features = torch.cat([features, added], 1)
        fused: Tensor = self.fusion(features)
        return x_BWhw + fused


class AdaLayerNorm(nn.Module):
    """FiLM by the condition over a layer norm of the feature channels; the identity untrained."""

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(condition_width, 2 * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BWhw: Tensor, condition_BD: Tensor) -> Tensor:
        """Return LN(x) (1 + gain) + shift, (B, W, h, w), in float32."""
        modulation: Tensor = self.linear(F.silu(condition_BD).to(self.linear.weight.dtype))
        gain, shift = modulation.float()[:, :, None, None].chunk(2, 1)
        x_BhwW = x_BWhw.float().movedim(1, -1)
        normed = F.layer_norm(x_BhwW, x_BhwW.shape[-1:]).movedim(-1, 1)
        return normed * (1 + gain) + shift


class GroupedAttention(nn.Module):
    """Attention of a latent's cells to those of coarser latents, then to one another.

    Queries have H heads, keys and values fewer: head h uses number h // (H / M). Positions are
    added to what queries and keys are made of. Source: Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(self, width: int, num_heads: int, num_kv_groups: int, *, own_keys: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_groups = num_heads, num_kv_groups
        self.q = nn.Linear(width, width)
        if own_keys:
            self.k = nn.Linear(width, width // num_heads * num_kv_groups)
            self.v = nn.Linear(width, width // num_heads * num_kv_groups)
        self.own_keys = own_keys
        self.out = nn.Linear(width, width)

    def forward(
        self, x_BLW: Tensor, positions_LW: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Return (B, L, W), and this latent's own keys and values (L, B, M, K), if it has any.

        `past` is those of the coarser latents, (P, B, M, K). At least one of both exists.
        """
        dtype = self.q.weight.dtype
        placed = (x_BLW + positions_LW).to(dtype)
        q_BLHK = self.q(placed).unflatten(-1, (self.num_heads, -1))
        own = None
        if self.own_keys:
            heads = (self.num_kv_groups, -1)
            k_LBMK = self.k(placed).unflatten(-1, heads).transpose(0, 1)
            v_LBMK = self.v(x_BLW.to(dtype)).unflatten(-1, heads).transpose(0, 1)
            own = k_LBMK, v_LBMK
        caches = [cache for cache in (past, own) if cache is not None]
        # Autocast makes fresh keys narrower than cached ones that left it.
        keys, values = (
            torch.cat([t.to(q_BLHK.dtype) for t in tensors])
            for tensors in zip(*caches, strict=True)
        )
        mixed = self._attend(q_BLHK, keys, values)
        return self.out(mixed), own

    def _attend(self, q_BLHK: Tensor, k_SBMK: Tensor, v_SBMK: Tensor) -> Tensor:
        """Return (B, L, W).

        The queries that share a head of keys stand one behind the other as more tokens of it, so
        plain attention serves and no key is repeated.
        """
        length = q_BLHK.shape[1]
        q_BLMRK = torch.unflatten(q_BLHK, 2, (self.num_kv_groups, -1))
        q_BMTK = q_BLMRK.permute(0, 2, 3, 1, 4).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(
            q_BMTK, k_SBMK.permute(1, 2, 0, 3), v_SBMK.permute(1, 2, 0, 3)
        )
        return torch.unflatten(mixed, 2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2)


class FeatureBlock(nn.Module):
    """A residual dense block, then attention under the condition."""

    def __init__(self, config: NextScaleConfig, width: int, *, own_keys: bool) -> None:
        super().__init__()
        generator = config.generator
        self.dense = ResidualDenseBlock(width, generator.growth, generator.dropout)
        self.norm = AdaLayerNorm(width, generator.condition_width)
        self.attention = GroupedAttention(
            width, generator.num_heads, generator.num_kv_groups, own_keys=own_keys
        )

    def forward(
        self,
        x_BWhw: Tensor,
        condition_BD: Tensor,
        positions_LW: Tensor,
        past: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue | None]:
        """Return (B, W, h, w) and this block's own keys and values."""
        x_BWhw = self.dense(x_BWhw)
        tokens_BLW = self.norm(x_BWhw, condition_BD).flatten(2).transpose(1, 2)
        mixed, own = self.attention(tokens_BLW, positions_LW, past)
        return x_BWhw + mixed.transpose(1, 2).unflatten(2, x_BWhw.shape[2:]), own


class Base(nn.Module):
    """The network of the first latent: velocity at a time between noise and data, or the latent.

    With no blocks it is conv, AdaLN, GELU, conv.
    """

    positions_LW: Tensor

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        generator, channels = config.generator, config.vae.latent_channels
        width, condition = generator.base_width, generator.condition_width
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        if generator.base == "flow":
            self.time_in = nn.Linear(_TIME_CHANNELS, condition)
            self.time_out = nn.Linear(condition, condition)
        self.blocks = nn.ModuleList(
            FeatureBlock(config, width, own_keys=True) for _ in range(generator.base_blocks)
        )
        self.norm = AdaLayerNorm(width, condition)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
        positions = position_table(config.initial_size, width)
        self.register_buffer("positions_LW", positions, persistent=False)

    def forward(self, x_BChw: Tensor, condition_BD: Tensor, time_B: Tensor | None) -> Tensor:
        """Return (B, C, h, w); `time_B` in [0, 1] is 0 at noise, 1 at data, None for regression."""
        dtype = self.conv_in.weight.dtype
        if time_B is not None:
            channels = time_channels(time_B).to(dtype)
            condition_BD = condition_BD + self.time_out(F.silu(self.time_in(channels))).float()
        features = self.conv_in(x_BChw.to(dtype))
        for block in self.blocks:
            features, _ = block(features, condition_BD, self.positions_LW)
        features = F.gelu(self.norm(features, condition_BD)).to(dtype)
        found: Tensor = self.conv_out(features)
        return found.to(x_BChw.dtype)


class Predictor(nn.Module):
    """From one latent to the next: bilinear upsampling plus a predicted residual.

    Untrained, the residual is zero.
    """

    positions_LW: Tensor
    upsample: Tensor

    def __init__(self, config: NextScaleConfig, index: int) -> None:
        super().__init__()
        generator, channels = config.generator, config.vae.latent_channels
        width, factor = generator.width, config.scale_factor
        side = config.sides[index]
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            FeatureBlock(config, width, own_keys=config.has_keys(index))
            for _ in range(generator.num_blocks)
        )
        self.expand = nn.Conv2d(width, width * factor**2, 3, padding=1)
        self.factor = factor
        self.norm = AdaLayerNorm(width, generator.condition_width)
        self.conv_out = zero_conv(width, channels)
        positions = position_table(side, width)
        self.register_buffer("positions_LW", positions, persistent=False)
        matrix = torch.from_numpy(bilinear_matrix(side, side * factor).copy())
        self.register_buffer("upsample", matrix, persistent=False)

    def forward(
        self, x_BChw: Tensor, condition_BD: Tensor, past: Sequence[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """Return the next latent and the keys and values by which the cache grows, per block.

        `past` holds the cached ones of every block, or nothing.
        """
        dtype = self.conv_in.weight.dtype
        features = self.conv_in(x_BChw.to(dtype))
        grown = []
        for i, block in enumerate(self.blocks):
            cached = past[i] if past else None
            features, own = block(features, condition_BD, self.positions_LW, cached)
            if own is not None:
                grown.append(own)
        features = F.gelu(F.pixel_shuffle(self.expand(features), self.factor))
        residual = self.conv_out(self.norm(features, condition_BD).to(dtype))
        smooth = resize(x_BChw.float(), self.upsample)
        return (smooth + residual.float()).to(x_BChw.dtype), grown


class Refinement(nn.Module):
    """The last latent plus a correction; none untrained."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        generator, channels = config.generator, config.vae.latent_channels
        self.conv_in = nn.Conv2d(channels, generator.width, 3, padding=1)
        self.dense = ResidualDenseBlock(generator.width, generator.growth, generator.dropout)
        self.conv_out = zero_conv(generator.width, channels)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Return (B, C, h, w)."""
        features = self.dense(F.gelu(self.conv_in(x_BChw.to(self.conv_in.weight.dtype))))
        correction: Tensor = self.conv_out(features)
        return (x_BChw.float() + correction.float()).to(x_BChw.dtype)


class NextScaleGenerator(nn.Module):
    """All that is trained on latents: condition, base, predictors, refinement."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        self.config = config
        self.condition = TextProjection(config)
        self.base = Base(config)
        self.predictors = nn.ModuleList(
            Predictor(config, index) for index in range(config.num_predictors)
        )
        self.refine = Refinement(config)

    def forward(self, latent_BChw: Tensor, condition_BD: Tensor) -> list[Tensor]:
        """Return the latents of all scales grown from the first one, which leads them.

        The whole chain in one pass, as `nsp.families.next_scale.loop` makes it stage by stage.
        """
        latents, past = [latent_BChw], list[KeyValue]()
        for predictor in self.predictors:
            latent, new = predictor(latents[-1], condition_BD, past)
            past = grow(past, new)
            latents.append(latent)
        return [*latents[:-1], self.refine(latents[-1])]


class TextProjection(nn.Module):
    """Mean token states -> condition vectors; a learned vector where there is no prompt."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.text.text_width, config.generator.condition_width)
        self.null_D = nn.Parameter(torch.zeros(config.generator.condition_width))

    def forward(self, text_mean_ND: Tensor, rows_G: Tensor) -> Tensor:
        """Return (G, D) in float32: rows picked from N prompts, row N being no prompt."""
        known: Tensor = self.linear(text_mean_ND.to(self.linear.weight.dtype))
        return torch.cat([known.float(), self.null_D[None].float()]).index_select(0, rows_G)


def grow(past: Sequence[KeyValue], new: Sequence[KeyValue]) -> list[KeyValue]:
    """Return the cache of every block with what a predictor added behind it."""
    if not past or not new:
        return list(new or past)
    pairs = zip(past, new, strict=True)
    return [(torch.cat([p[0], n[0]]), torch.cat([p[1], n[1]])) for p, n in pairs]


def zero_conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    """Return a convolution that adds nothing until it is trained."""
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def resize(x_BChw: Tensor, matrix: Tensor) -> Tensor:
    """Return matrix @ x @ matrix^T for every channel, never in the narrower type of autocast."""
    matrix = matrix.to(x_BChw.dtype)
    if torch.is_autocast_enabled(x_BChw.device.type):
        with torch.autocast(x_BChw.device.type, enabled=False):
            return matrix @ x_BChw @ matrix.transpose(0, 1)
    return matrix @ x_BChw @ matrix.transpose(0, 1)


def position_table(side: int, width: int) -> Tensor:
    """Return sines and cosines (L, W) of the cells' places in [0, 1], the same on every scale.

    Half the channels are for rows, half for columns; wavelengths go from two pictures down to a
    64th of one, the finest that a side of 128 can show.
    """
    channels = width // 4
    octaves = torch.linspace(0, 7, channels) if channels > 1 else torch.zeros(1)
    angles = (torch.arange(side) + 0.5)[:, None] / side * math.pi * 2**octaves
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side**2, -1)


def time_channels(time_B: Tensor) -> Tensor:
    """Return sines and cosines (B, 64) of times in [0, 1], in float32.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, with time in thousandths.
    """
    half = _TIME_CHANNELS // 2
    steps = torch.arange(half, device=time_B.device, dtype=torch.float32) / half
    angles = 1000 * time_B.float()[:, None] * torch.exp(-math.log(10_000) * steps)
    return torch.cat([angles.sin(), angles.cos()], 1)
