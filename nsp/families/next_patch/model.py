"""The transformer of LlamaGen, which draws codes in raster order after its condition.

Axes: B batch, G rows of the transformer (the batch, then the same images under the null condition),
T condition tokens, N codes, L positions, P cached tokens, D width, H heads, J key and value heads,
K head width, V codes of the codebook. Module and parameter names are the published ones.
Source: arXiv:2406.06525; github.com/FoundationVision/LlamaGen, autoregressive/models/gpt.py.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.families.next_patch.config import CaptionCondition, GptConfig, NextPatchConfig
from nsp.layers.rotary import grid_rotary, rotate_pairs
from nsp.raster.patches import averaged

# A layer, its queries, keys and values in one tensor (G,L,(H+2J)K), rotations -> (G,L,H K).
Attend: TypeAlias = "Callable[[Attention, Tensor, Tensor], Tensor]"

_INIT_STD = 0.02


class RMSNorm(nn.Module):
    """x / rms(x) in float32, times a weight in the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised tensor."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def _applied(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return the product in the dtype of the weights."""
    result: Tensor = linear(x.to(linear.weight.dtype))
    return result


class Attention(nn.Module):
    """Attention with one fused projection without biases; `attend` owns the cache and the mask."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.kv_heads, config.kv_heads)
        self.head_width, self.dropout = config.head_width, config.resid_dropout
        self.wqkv = nn.Linear(config.width, sum(self.heads) * config.head_width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_GLD: Tensor, table_LK2: Tensor, attend: Attend) -> Tensor:
        """Return (G, L, D)."""
        mixed = attend(self, _applied(self.wqkv, x_GLD), table_LK2)
        return F.dropout(_applied(self.wo, mixed).float(), self.dropout, self.training)

    def rotated(self, packed_GLM: Tensor, table_LK2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (G, L, H, K), keys and values (G, L, J, K) of one projection."""
        heads = packed_GLM.unflatten(-1, (-1, self.head_width))
        num_queries, num_keys, num_values = self.heads
        turned, v = heads.split((num_queries + num_keys, num_values), dim=2)
        # At once: an engine run of one token is long enough for its weights alone.
        q, k = rotate_pairs(turned, table_LK2).split((num_queries, num_keys), dim=2)
        return q, k, v


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.dropout = config.ffn_dropout
        self.w1 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w3 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w2 = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (G, L, D)."""
        gated = F.silu(_applied(self.w1, x)) * _applied(self.w3, x)
        return F.dropout(_applied(self.w2, gated).float(), self.dropout, self.training)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm, added to the residual stream in float32."""

    def __init__(self, config: GptConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.drop_path_rate = drop_path_rate

    def forward(self, x_GLD: Tensor, table_LK2: Tensor, attend: Attend) -> Tensor:
        """Return (G, L, D)."""
        x_GLD = x_GLD + self._kept(self.attention(self.attention_norm(x_GLD), table_LK2, attend))
        return x_GLD + self._kept(self.feed_forward(self.ffn_norm(x_GLD)))

    def _kept(self, branch_GLD: Tensor) -> Tensor:
        """Return the branch, in training without that of randomly chosen rows (drop path)."""
        if not self.training or self.drop_path_rate == 0:
            return branch_GLD
        keep = 1 - self.drop_path_rate
        kept_G11 = branch_GLD.new_empty(branch_GLD.shape[0], 1, 1).bernoulli_(keep)
        return branch_GLD * kept_G11 / keep


class ClassEmbedding(nn.Module):
    """One vector per class; the last one is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, class_ids_G: Tensor) -> Tensor:
        """Return (G, 1, D)."""
        found: Tensor = self.embedding_table(class_ids_G)[:, None]
        return found


class _Projection(nn.Module):
    """fc2(gelu_tanh(fc1(x))), without biases."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(text_width, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D)."""
        hidden = F.gelu(_applied(self.fc1, x), approximate="tanh")
        return _applied(self.fc2, hidden).float()


class CaptionEmbedding(nn.Module):
    """Projected T5 features; the null condition is a block of features that is never trained."""

    MEASURED_BUFFERS = ("uncond_embedding",)  # drawn, not computed

    uncond_embedding: Tensor

    def __init__(self, condition: CaptionCondition, width: int) -> None:
        super().__init__()
        self.cap_proj = _Projection(condition.text_width, width)
        null_TC = torch.randn(condition.max_tokens, condition.text_width)
        self.register_buffer("uncond_embedding", null_TC / condition.text_width**0.5)

    def forward(self, features_GTC: Tensor) -> Tensor:
        """Return (G, T, D)."""
        found: Tensor = self.cap_proj(features_GTC)
        return found


class Gpt(nn.Module):
    """The whole transformer; `table` has the rotations of all positions, the condition's first."""

    table: Tensor

    def __init__(self, config: NextPatchConfig) -> None:
        super().__init__()
        gpt, self.config = config.gpt, config
        self.tok_embeddings = nn.Embedding(config.vq.codebook_size, gpt.width)
        self.cls_embedding: ClassEmbedding | CaptionEmbedding = (
            ClassEmbedding(config.num_classes, gpt.width)
            if config.caption is None
            else CaptionEmbedding(config.caption, gpt.width)
        )
        rates = [gpt.drop_path_rate * i / max(gpt.depth - 1, 1) for i in range(gpt.depth)]
        self.layers = nn.ModuleList(Block(gpt, rate) for rate in rates)
        self.norm = RMSNorm(gpt.width, gpt.norm_eps)
        self.output = nn.Linear(gpt.width, config.vq.codebook_size, bias=False)
        self.register_buffer("table", self.rotations(1), persistent=False)

    def rotations(self, patch_side: int) -> Tensor:
        """Return the rotary table (T + N / patch_side^2, K/2, 2) for patches of codes.

        The rows of the condition are zero, not (1, 0): its queries and keys are zero vectors. The
        public code computes it so, and the published weights depend on it.
        """
        config = self.config
        side, width = config.grid_side // patch_side, config.gpt.head_width
        codes = grid_rotary(side, width, base=config.gpt.rope_base)
        return torch.cat([torch.zeros(config.num_prefix, *codes.shape[1:]), codes])

    def embed(self, prefix_BTD: Tensor, codes_BN: Tensor, patch_side: int = 1) -> Tensor:
        """Return the training input (B, T + N / patch_side^2 - 1, D): the last patch is not fed."""
        embedded = self.tok_embeddings(codes_BN)
        patches = averaged(embedded, self.config.grid_side, patch_side)
        x = torch.cat([prefix_BTD.to(patches.dtype), patches[:, :-1]], 1)
        return F.dropout(x, self.config.gpt.token_dropout, self.training)

    def transformed(self, x_GLD: Tensor, table_LK2: Tensor, attends: "list[Attend]") -> Tensor:
        """Return the hidden states (G, L, D) before the last norm."""
        for layer, attend in zip(self.layers, attends, strict=True):
            x_GLD = layer(x_GLD, table_LK2, attend)
        return x_GLD

    def logits(self, x_GLD: Tensor) -> Tensor:
        """Return the logits (G, L, V), in float32."""
        return _applied(self.output, self.norm(x_GLD)).float()

    def forward(
        self,
        prefix_BTD: Tensor,
        codes_BN: Tensor,
        *,
        mask: Tensor | None = None,
        patch_side: int = 1,
    ) -> Tensor:
        """Return the logits (B, N / patch_side^2, V) of every patch, from all before it.

        `mask` is boolean and broadcast to (B, H, L, L), true where a position may look; None is
        causal.
        """
        table = self.table if patch_side == 1 else self.rotations(patch_side).to(self.table)
        x_BLD = self.embed(prefix_BTD, codes_BN, patch_side)
        attend = attend_all(mask)
        x_BLD = self.transformed(x_BLD, table[: x_BLD.shape[1]], [attend] * len(self.layers))
        return self.logits(x_BLD[:, prefix_BTD.shape[1] - 1 :])


def attend_all(mask: Tensor | None, new: list[Tensor] | None = None) -> Attend:
    """Return attention over all positions at once, as in training and for a prefix.

    Keys and values, (L, G, J, K) each, are added to `new`.
    """

    def attend(layer: Attention, packed_GLM: Tensor, table_LK2: Tensor) -> Tensor:
        q_GLHK, k_GLJK, v_GLJK = layer.rotated(packed_GLM, table_LK2)
        if new is not None:
            new.extend([k_GLJK.transpose(0, 1), v_GLJK.transpose(0, 1)])
        shared = q_GLHK.shape[2] // k_GLJK.shape[2]
        k, v = (each.repeat_interleave(shared, 2).transpose(1, 2) for each in (k_GLJK, v_GLJK))
        q = q_GLHK.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return mixed.transpose(1, 2).flatten(2)

    return attend


def prefix_mask(first_G: Tensor, num_prefix: int, length: int) -> Tensor:
    """Return which positions may look where, (G, 1, L, L): causal, without a prompt's padding.

    `first_G` is the first position of every row that is not padding. A padded position looks at
    itself, so that no row of the softmax is empty.
    """
    at = torch.arange(length, device=first_G.device)
    real_GL = (at >= first_G[:, None]) | (at >= num_prefix)
    allowed = (at[:, None] >= at) & real_GL[:, None, None]
    return allowed | (at[:, None] == at)


def initialize(gpt: Gpt) -> None:
    """Draw all weights as the public code does: normal, with an output of zero."""
    for module in gpt.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=_INIT_STD)
    nn.init.zeros_(gpt.output.weight)
