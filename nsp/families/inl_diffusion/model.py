"""The INL-DiT: patches of a noisy latent, the timestep and the text -> the prediction.

Parameters have the names of the published weights. What depends on the prompt alone (`read`) and on
the timestep alone (`modulation`) is computed apart, as engines do.

Axes: B images, G rows (the images, then their null rows), N patches, D width, H heads, J key and
value heads, K head width, T prompt tokens, W context width, M numbers of modulation, C latent
channels, h w latent grid.
Source: github.com/Web3-League/inl-diffusion, inl_diffusion/models/inl_dit.py; Peebles and Xie,
"Scalable Diffusion Models with Transformers" (AdaLN-Zero).
"""

import math
import re
from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.families.inl_diffusion.config import DitConfig, InlConfig
from nsp.families.inl_diffusion.integrator import INTEGRATORS, Integrated
from nsp.layers.applied import applied
from nsp.layers.attention import KeyValue
from nsp.layers.rotary import grid_rotary, rotate_pairs

_EPS = 1e-6
_OPEN_STD = 0.2
# Parameters: AdaLN-Zero, and what was added to the public form, which begins without effect.
_ZERO_AT_FIRST = re.compile(
    r"adaLN_modulation|^final_layer\.linear\.|^pooled_embed\.|^control\.(patch_embed|outputs)\."
)
_FREQUENCY_BASE = 10_000.0


class RmsNorm(nn.Module):
    """x / sqrt(mean(x²) + ε), times a weight per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape, in float32."""
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS) * self.weight


class PatchEmbed(nn.Module):
    """A latent -> one vector per patch, in raster order."""

    def __init__(self, config: InlConfig) -> None:
        super().__init__()
        size = config.dit.patch_size
        self.proj = nn.Conv2d(config.vae.latent_channels, config.dit.width, size, size)

    def forward(self, latent_BChw: Tensor) -> Tensor:
        """Return (B, N, D)."""
        return applied(self.proj, latent_BChw).float().flatten(2).transpose(1, 2)


class TimestepEmbed(nn.Module):
    """A timestep -> a vector: cosines, then sines, through two layers; always in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_rates = width // 2
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        )

    def forward(self, timestep_S: Tensor) -> Tensor:
        """Return (S, D)."""
        rates = torch.exp(
            torch.arange(self.num_rates) * (-math.log(_FREQUENCY_BASE) / self.num_rates)
        )
        angles = timestep_S.float()[:, None] * rates.to(timestep_S.device)
        result: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], -1))
        return result


class SelfAttention(nn.Module):
    """Attention among patches; fewer key and value heads than query heads."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.heads, self.shared = config.num_heads, config.num_heads // config.num_kv_heads
        width, kv_width = config.width, config.num_kv_heads * config.head_width
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_GND: Tensor, rotary_NK2: Tensor) -> Tensor:
        """Return (G, N, D), in float32."""
        q, k, v = (
            applied(part, x_GND).unflatten(-1, (heads, -1))
            for part, heads in (
                (self.q_proj, self.heads),
                (self.k_proj, self.heads // self.shared),
                (self.v_proj, self.heads // self.shared),
            )
        )
        q, k = rotate_pairs(q, rotary_NK2), rotate_pairs(k, rotary_NK2)
        k, v = (each.repeat_interleave(self.shared, 2) for each in (k, v))
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        return applied(self.out_proj, mixed.transpose(1, 2).flatten(2)).float()


class CrossAttention(nn.Module):
    """Attention to the text, whose keys and values are computed once per prompt."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.context_width, config.width, bias=False)
        self.v_proj = nn.Linear(config.context_width, config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)

    def keys(self, context_NTW: Tensor) -> KeyValue:
        """Return keys and values (N, H, T, K)."""
        k, v = (
            applied(part, context_NTW).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.k_proj, self.v_proj)
        )
        return k, v

    def forward(self, x_GND: Tensor, text: KeyValue) -> Tensor:
        """Return (G, N, D), in float32."""
        q = applied(self.q_proj, x_GND).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, *text)
        return applied(self.out_proj, mixed.transpose(1, 2).flatten(2)).float()


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x_GND: Tensor) -> Tensor:
        """Return (G, N, D), in float32."""
        return applied(self.fc2, F.gelu(applied(self.fc1, x_GND))).float()


class _Modulated(Protocol):
    adaLN_modulation: nn.Sequential


def _modulation(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward and the integrator."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        width, self.dropout = config.width, config.dropout
        self.norm1, self.norm2, self.norm3 = RmsNorm(width), RmsNorm(width), RmsNorm(width)
        self.norm_context = RmsNorm(config.context_width)
        self.attn, self.cross_attn = SelfAttention(config), CrossAttention(config)
        self.mlp = FeedForward(config)
        self.integrator = INTEGRATORS[config.integrator](config)
        self.adaLN_modulation = _modulation(width, 6)

    def keys(self, context_NTW: Tensor) -> KeyValue:
        """Return the text's keys and values."""
        return self.cross_attn.keys(self.norm_context(context_NTW))

    def forward(
        self, x_GND: Tensor, modulation: Tensor, rotary_NK2: Tensor, text: KeyValue | Tensor
    ) -> Integrated:
        """Return the state (G, N, D) and the integrator's gate (G, N).

        `modulation` is (..., 6D) and `text` has keys and values; or they are the embedded timestep
        (..., D) and the text states, of which the block then makes both. In training all weights of
        a block are so used inside its call, as sharding and recomputation need it.
        """
        if isinstance(text, Tensor):
            modulation, text = self.adaLN_modulation(modulation), self.keys(text)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, -1)
        seen = self.norm1(x_GND) * (1 + scale1) + shift1
        x_GND = x_GND + gate1 * self._kept(self.attn(seen, rotary_NK2))
        x_GND = x_GND + self._kept(self.cross_attn(self.norm2(x_GND), text))
        seen = self.norm3(x_GND) * (1 + scale2) + shift2
        x_GND = x_GND + gate2 * self._kept(self.mlp(seen))
        return cast("Integrated", self.integrator(x_GND))

    def _kept(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training)


class FinalLayer(nn.Module):
    """The last norm with its own shift and scale, and the prediction of every patch."""

    def __init__(self, config: InlConfig) -> None:
        super().__init__()
        width, size = config.dit.width, config.dit.patch_size
        self.norm = RmsNorm(width)
        self.linear = nn.Linear(width, size * size * config.vae.latent_channels)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x_GND: Tensor, modulation: Tensor) -> Tensor:
        """Return (G, N, p²C), in float32."""
        shift, scale = modulation[:, None].chunk(2, -1)
        return applied(self.linear, self.norm(x_GND) * (1 + scale) + shift).float()


class InlControl(nn.Module):
    """Trainable copies of the first blocks, which read a control picture as a latent.

    What they find is added to the main blocks through layers that are zero at first: the picture is
    then the base's, bit for bit. Source: Zhang, Rao, Agrawala, "Adding Conditional Control to
    Text-to-Image Diffusion Models", with transformer blocks as in Chen et al., "PixArt-δ".
    """

    def __init__(self, config: InlConfig) -> None:
        super().__init__()
        width = config.dit.width
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config.dit) for _ in range(config.control_depth))
        self.outputs = nn.ModuleList(nn.Linear(width, width) for _ in range(config.control_depth))

    def begin(self, dit: "InlDit") -> None:
        """Start as a copy of the trained blocks, without effect."""
        for own, trained in zip(self.blocks, dit.blocks, strict=False):
            own.load_state_dict(trained.state_dict())
        for layer in (self.patch_embed.proj, *self.outputs):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        x_GND: Tensor,
        control_GChw: Tensor,
        modulations: Sequence[Tensor],
        texts: Sequence[KeyValue] | Sequence[Tensor],
        rotary_NK2: Tensor,
    ) -> list[Tensor]:
        """Return what is added behind every main block (G, N, D), given embedded patches."""
        x_GND = x_GND + self.patch_embed(control_GChw)
        found = []
        for block, output, modulation, text in zip(
            self.blocks, self.outputs, modulations, texts, strict=True
        ):
            x_GND, _ = block(x_GND, modulation, rotary_NK2, text)
            found.append(applied(cast("nn.Linear", output), x_GND).float())
        return found


class InlDit(nn.Module):
    """The whole transformer."""

    def __init__(self, config: InlConfig) -> None:
        super().__init__()
        dit, self.config = config.dit, config
        self.patch_embed = PatchEmbed(config)
        self.t_embed = TimestepEmbed(dit.width)
        self.blocks = nn.ModuleList(Block(dit) for _ in range(dit.depth))
        self.final_layer = FinalLayer(config)
        self.null_embedding = nn.Parameter(torch.randn(1, dit.num_states, dit.context_width) * 0.02)
        if dit.pooled_width:
            self.pooled_embed = nn.Linear(dit.pooled_width, dit.width)
        if config.control_depth:
            self.control = InlControl(config)
        for side in config.sides:
            table = grid_rotary(side // dit.patch_size, dit.head_width)
            self.register_buffer(f"rotary_{side}", table, persistent=False)

    def rotary(self, side: int) -> Tensor:
        """Return the rotations (N, K/2, 2) of the patches of latents with this side."""
        return self.get_buffer(f"rotary_{side}")

    def read(self, context_NTW: Tensor) -> list[KeyValue]:
        """Return the keys and values of text states in every block, then in every control block."""
        blocks, states = [*self.blocks, *self.control_blocks], self.states(context_NTW)
        return [cast("Block", block).keys(states) for block in blocks]

    def states(self, context_NTW: Tensor) -> Tensor:
        """Return the states of the tokens alone; a summary of the prompt may come behind them."""
        return context_NTW[:, :-1] if self.config.dit.pooled_width else context_NTW

    def embedded(self, timestep_S: Tensor, context_STW: Tensor | None) -> Tensor:
        """Return embedded timesteps (S, D), with the summaries of prompts in a model that has them.

        There may be one timestep for all prompts.
        """
        found: Tensor = self.t_embed(timestep_S)
        if pooled := self.config.dit.pooled_width:
            assert context_STW is not None
            found = found + self.pooled_embed(context_STW[:, -1, :pooled])
        return found

    def modulation(self, timestep_S: Tensor, context_STW: Tensor | None = None) -> Tensor:
        """Return shifts, scales and gates (S, M) of all blocks and of the end, for timesteps.

        A model that reads summaries of prompts needs the text states, too.
        """
        embedded = self.embedded(timestep_S, context_STW)
        parts = [*self.blocks, *self.control_blocks, self.final_layer]
        return torch.cat(
            [cast("_Modulated", part).adaLN_modulation(embedded) for part in parts], -1
        )

    @property
    def control_blocks(self) -> Sequence[nn.Module]:
        """The blocks that read a control picture; empty without a control."""
        return [*self.control.blocks] if self.config.control_depth else []

    def divided(self, modulation_SM: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return the modulation of every block, of every control block, and that of the end."""
        config, width = self.config, self.config.dit.width
        num_blocks = config.dit.depth + config.control_depth
        *blocks, last = modulation_SM.split([6 * width] * num_blocks + [2 * width], -1)
        return blocks[: config.dit.depth], blocks[config.dit.depth :], last

    def controlled(
        self,
        latent_GChw: Tensor,
        control_GChw: Tensor,
        modulation_SM: Tensor,
        texts: Sequence[KeyValue],
        rotary_NK2: Tensor,
    ) -> list[Tensor]:
        """Return what the control adds behind the first blocks (G, N, D).

        `texts` are the keys and values of the control's own blocks.
        """
        _, modulations, _ = self.divided(modulation_SM)
        found: list[Tensor] = self.control(
            self.patch_embed(latent_GChw), control_GChw, modulations, texts, rotary_NK2
        )
        return found

    def predict(
        self,
        latent_GChw: Tensor,
        modulation_SM: Tensor,
        texts: Sequence[KeyValue],
        rotary_NK2: Tensor,
        added: Sequence[Tensor] = (),
    ) -> Integrated:
        """Return the prediction (G, C, h, w) and the mean gate (G, N) of all integrators.

        `modulation_SM` has one row, or one per row of the latent. `added` (G, N, D) is what a
        control adds behind the first blocks.
        """
        by_block, _, last = self.divided(modulation_SM)
        return self._predicted(latent_GChw, by_block, last, texts, rotary_NK2, added)

    def _predicted(
        self,
        latent_GChw: Tensor,
        by_block: Sequence[Tensor],
        last: Tensor,
        texts: Sequence[KeyValue] | Sequence[Tensor],
        rotary_NK2: Tensor,
        added: Sequence[Tensor],
    ) -> Integrated:
        grid = latent_GChw.shape[-2:]
        x, gates = self.patch_embed(latent_GChw), []
        for block, modulation, text in zip(self.blocks, by_block, texts, strict=True):
            x, gate = block(x, modulation, rotary_NK2, text)
            gates.append(gate)
            if len(gates) <= len(added):
                x = x + added[len(gates) - 1]
        return self._picture(self.final_layer(x, last), grid), torch.stack(gates).mean(0)

    def _picture(self, tokens_GNV: Tensor, grid: torch.Size) -> Tensor:
        """Return (G, C, h, w) of vectors in the order row, column, channel."""
        size = self.config.dit.patch_size
        rows, columns = grid[0] // size, grid[1] // size
        tokens = tokens_GNV.unflatten(-1, (size, size, -1)).unflatten(1, (rows, columns))
        picture: Tensor = tokens.permute(0, 5, 1, 3, 2, 4)
        return picture.reshape(len(tokens_GNV), -1, *grid)

    def forward(
        self,
        latent_BChw: Tensor,
        timestep_B: Tensor,
        context_BTW: Tensor,
        control_BChw: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction (B, C, h, w), as in training."""
        embedded, states = self.embedded(timestep_B, context_BTW), self.states(context_BTW)
        rotary = self.rotary(latent_BChw.shape[-1])
        added: list[Tensor] = []
        if control_BChw is not None:
            count, patches = len(self.control_blocks), self.patch_embed(latent_BChw)
            times, texts = [embedded] * count, [states] * count
            added = self.control(patches, control_BChw, times, texts, rotary)
        times, texts = ([each] * len(self.blocks) for each in (embedded, states))
        last = self.final_layer.adaLN_modulation(embedded)
        prediction, _ = self._predicted(latent_BChw, times, last, texts, rotary, added)
        return prediction


def initialize(dit: InlDit) -> None:
    """Set the weights of an untrained transformer, drawn from torch's global generator.

    As the public code: Xavier, and zeros where AdaLN-Zero says. Cross-attention and integrators
    are not zero, so that blocks are not the identity.
    """
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in dit.named_parameters():
        if ".expert_w" in name:
            for expert in parameter:
                nn.init.xavier_uniform_(expert)
        if _ZERO_AT_FIRST.search(name):
            nn.init.zeros_(parameter)
    if dit.config.control_depth:
        dit.control.begin(dit)


def open_gates(dit: InlDit) -> None:
    """Replace the zeros of an untrained transformer by small numbers, so that all of it matters."""
    for name, parameter in dit.named_parameters():
        if _ZERO_AT_FIRST.search(name):
            nn.init.normal_(parameter, std=_OPEN_STD)
