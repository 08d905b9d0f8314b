"""The transformer of `latent_gpt`: GPT-2's blocks, which also look at the text.

Axes: B batch, G rows of the transformer (the batch, then the same images under the null prompt),
N codes, M patches of codes, L positions, P cached tokens, T prompt tokens, W text width, D width,
H heads, K head width, V codes of the codebook.
Source: Radford et al. 2019; transformers, models/gpt2/modeling_gpt2.py (the order of the branches).
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.families.latent_gpt.config import GptConfig, LatentGptConfig
from nsp.layers.attention import KeyValue
from nsp.raster.patches import averaged

# A layer, its queries, keys and values in one tensor (G,L,3 D) -> mixed values (G,L,D).
Attend: TypeAlias = "Callable[[Attention, Tensor], Tensor]"

_INIT_STD = 0.02


def _applied(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return the product in the dtype of the weights."""
    result: Tensor = linear(x.to(linear.weight.dtype))
    return result


class Attention(nn.Module):
    """Self-attention with one fused projection; `attend` owns the cache and the mask."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_GLD: Tensor, attend: Attend) -> Tensor:
        """Return (G, L, D)."""
        return _applied(self.proj, attend(self, _applied(self.qkv, x_GLD))).float()

    def heads(self, packed_GLM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (G, L, H, K) of one projection."""
        q, k, v = packed_GLM.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return q, k, v


class CrossAttention(nn.Module):
    """Attention to the text, whose keys and values are computed once per prompt."""

    def __init__(self, config: GptConfig, text_width: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(text_width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def keys(self, states_NTW: Tensor) -> KeyValue:
        """Return keys (N, H, K, T) and values (N, H, T, K).

        In the layout of the products that use them: they are the same for every token, and a
        transposition in each step would copy them.
        """
        k, v = _applied(self.kv, states_NTW).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return k.permute(0, 2, 3, 1), v.transpose(1, 2)

    def forward(self, x_GLD: Tensor, text: KeyValue) -> Tensor:
        """Return (G, L, D)."""
        q_GHLK = _applied(self.q, x_GLD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        scores = (q_GHLK * q_GHLK.shape[-1] ** -0.5) @ text[0]
        weights = scores.float().softmax(-1).to(q_GHLK.dtype)
        return _applied(self.proj, (weights @ text[1]).transpose(1, 2).flatten(2)).float()


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.width)

    def forward(self, x_GLD: Tensor) -> Tensor:
        """Return (G, L, D)."""
        hidden = F.gelu(_applied(self.fc1, x_GLD), approximate=self.approximate)
        return _applied(self.fc2, hidden).float()


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward: each behind a norm, added to x."""

    def __init__(self, config: GptConfig, text_width: int | None) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        if text_width is not None:
            self.cross_norm = nn.LayerNorm(config.width, config.norm_eps)
            self.cross = CrossAttention(config, text_width)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x_GLD: Tensor, attend: Attend, text: KeyValue | None) -> Tensor:
        """Return (G, L, D), in float32."""
        x_GLD = x_GLD + self._kept(self.attn(self.norm1(x_GLD), attend))
        if text is not None:
            x_GLD = x_GLD + self._kept(self.cross(self.cross_norm(x_GLD), text))
        return x_GLD + self._kept(self.ffn(self.norm2(x_GLD)))

    def _kept(self, branch_GLD: Tensor) -> Tensor:
        return F.dropout(branch_GLD, self.dropout, self.training)


class Gpt(nn.Module):
    """The whole transformer; token V begins a picture."""

    MEASURED_BUFFERS = ("null_context",)  # what the text encoder makes of "", not computed here

    null_context: Tensor

    def __init__(self, config: LatentGptConfig) -> None:
        super().__init__()
        gpt, text, self.config = config.gpt, config.text, config
        self.token_embedding = nn.Embedding(config.vq.codebook_size + 1, gpt.width)
        self.position_embedding = nn.Embedding(config.grid.length, gpt.width)
        text_width = None if text is None else text.text_width
        self.blocks = nn.ModuleList(Block(gpt, text_width) for _ in range(gpt.depth))
        self.norm = nn.LayerNorm(gpt.width, gpt.norm_eps)
        self.head = nn.Linear(gpt.width, config.vq.codebook_size, bias=False)
        if text is not None:
            empty = torch.zeros(1, text.max_tokens, text.text_width)
            self.register_buffer("null_context", empty)

    def read(self, states_NTW: Tensor) -> list[KeyValue]:
        """Return the keys and values of encoded prompts in every block."""
        blocks = (block for block in self.blocks if isinstance(block, Block))
        return [block.cross.keys(states_NTW) for block in blocks]

    def transformed(
        self, x_GLD: Tensor, attends: Sequence[Attend], texts: Sequence[KeyValue | None]
    ) -> Tensor:
        """Return the logits (G, L, V), in float32, of embedded tokens."""
        for block, attend, text in zip(self.blocks, attends, texts, strict=True):
            x_GLD = block(x_GLD, attend, text)
        return _applied(self.head, self.norm(x_GLD)).float()

    def forward(
        self, texts: Sequence[KeyValue | None], codes_BN: Tensor, *, patch_side: int = 1
    ) -> Tensor:
        """Return the logits (B, M, V) of every patch, from all before it and the text.

        A position is that of the patch to predict: of wider patches the mean of their codes'.
        """
        config = self.config
        begin_B1 = codes_BN.new_full((len(codes_BN), 1), config.bos)
        patches = averaged(self.token_embedding(codes_BN), config.grid_side, patch_side)
        places = averaged(self.position_embedding.weight[None], config.grid_side, patch_side)
        x_BMD = torch.cat([self.token_embedding(begin_B1), patches[:, :-1]], 1) + places
        x_BMD = F.dropout(x_BMD, config.gpt.dropout, self.training)
        return self.transformed(x_BMD, [attend_before] * len(self.blocks), texts)


def attend_before(layer: Attention, packed_GLM: Tensor) -> Tensor:
    """Return attention of every position over itself and those before, as in training."""
    q, k, v = (each.transpose(1, 2) for each in layer.heads(packed_GLM))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def initialize(gpt: Gpt) -> None:
    """Draw all weights as GPT-2 does: those that end one of its 3 * depth branches smaller."""
    for name, module in gpt.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            ends_branch = name.endswith((".proj", ".fc2"))
            smaller = (3 * len(gpt.blocks)) ** -0.5 if ends_branch else 1.0
            nn.init.normal_(module.weight, std=_INIT_STD * smaller)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
