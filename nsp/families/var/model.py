"""The next-scale transformer, class- or text-conditional.

Axes: B batch, G rows of the transformer (the batch, then the same images under the null condition),
L new tokens, P cached tokens, T prompt tokens, C width, D text width, H heads, K head width, V
codes, Z latent channels. Module and parameter names are the published state-dict names; the text
variant adds `text_*` and `blocks.i.cross`. Source: arXiv:2404.02905;
github.com/FoundationVision/VAR, models/var.py and models/basic_var.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.families.var.config import TextCondition, VarConfig
from nsp.layers.attention import Attend, KeyValue, attend_masked, l2_normalize

_MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class Conditioning:
    """The condition's part in every scale step; computed once per image."""

    x_GLC: Tensor  # input tokens of the first scale
    modulation_IG6C: Tensor  # I blocks; gamma1, gamma2, scale1, scale2, shift1, shift2
    head_modulation_G2C: Tensor  # scale, shift
    text_k_IGTHK: Tensor | None = None
    text_v_IGTHK: Tensor | None = None


class SelfAttention(nn.Module):
    """Multi-head attention with one fused projection; keys have no bias."""

    zero_k_bias: Tensor

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        predictor = config.predictor
        width, heads = predictor.width, predictor.num_heads
        self.num_heads, self.l2_norm = heads, predictor.attn_l2_norm
        self.dropout = predictor.dropout
        if self.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        # Without q/k normalisation the published code divides by 4 sqrt(K), not by sqrt(K).
        self.scale = 1.0 if self.l2_norm else 0.25 / math.sqrt(predictor.head_width)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x_GLC: Tensor, past: KeyValue | Tensor | None, attend: Attend
    ) -> tuple[Tensor, KeyValue]:
        """Return (G, L, C) and the keys and values returned by `attend`."""
        dtype = self.mat_qkv.weight.dtype
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias]).to(dtype)
        qkv = self.mat_qkv(x_GLC.to(dtype)) + bias  # called, so that adapters in it take part
        q, k, v = torch.unflatten(qkv, -1, (3, self.num_heads, -1)).unbind(2)
        if self.l2_norm:
            gain = self.scale_mul_1H11.float().clamp_max(_MAX_LOG_SCALE).exp().squeeze(0)
            q = (l2_normalize(q) * gain.transpose(0, 1)).to(v.dtype)
            k = l2_normalize(k).to(v.dtype)
        mixed, cache = attend(q, k, v, past, scale=self.scale)
        return F.dropout(self.proj(mixed.flatten(2)), self.dropout, self.training), cache


class CrossAttention(nn.Module):
    """Attention of image tokens to the prompt's, whose keys and values are made once per image."""

    def __init__(self, config: VarConfig, text: TextCondition) -> None:
        super().__init__()
        width, self.num_heads = config.predictor.width, config.predictor.num_heads
        self.norm_eps, self.dropout = config.predictor.norm_eps, config.predictor.dropout
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.num_heads, 1, 1), math.log(4.0)))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text.text_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, states_GTD: Tensor) -> KeyValue:
        """Return the normalised keys and the values (G, T, H, K) of the prompt."""
        kv: Tensor = self.kv(states_GTD.to(self.kv.weight.dtype))
        k, v = torch.unflatten(kv, -1, (2, self.num_heads, -1)).unbind(2)
        return l2_normalize(k).to(v.dtype), v

    def forward(self, x_GLC: Tensor, text_k_GTHK: Tensor, text_v_GTHK: Tensor) -> Tensor:
        """Return (G, L, C)."""
        normed = F.layer_norm(x_GLC.float(), x_GLC.shape[-1:], eps=self.norm_eps)
        q = torch.unflatten(self.q(normed.to(self.q.weight.dtype)), -1, (self.num_heads, -1))
        gain = self.scale_mul_1H11.float().clamp_max(_MAX_LOG_SCALE).exp().squeeze(0)
        q = (l2_normalize(q) * gain.transpose(0, 1)).to(text_k_GTHK.dtype)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), text_k_GTHK.transpose(1, 2), text_v_GTHK.transpose(1, 2), scale=1.0
        )
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return F.dropout(out, self.dropout, self.training)


class FeedForward(nn.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        width = config.predictor.width
        hidden = round(width * config.predictor.mlp_ratio)
        self.dropout = config.predictor.dropout
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (G, L, C)."""
        hidden = self.fc1(x.to(self.fc1.weight.dtype))
        out: Tensor = self.fc2(F.gelu(hidden, approximate="tanh"))
        return F.dropout(out, self.dropout, self.training)


class AdaLinear(nn.Sequential):
    """Condition vectors -> `count` AdaLN vectors each, by a linear layer of silu(condition)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, count * width))
        self.count = count

    @property
    def linear(self) -> nn.Linear:
        """The layer with the weights; the published names count the activation before it."""
        layer = self[1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, cond_GC: Tensor) -> Tensor:
        """Return (G, count, C) in float32, computed in the dtype of the weights."""
        out: Tensor = self.linear(F.silu(cond_GC).to(self.linear.weight.dtype))
        return torch.unflatten(out.float(), -1, (self.count, -1))


class Block(nn.Module):
    """Self-attention, cross-attention to the prompt if there is one, feed-forward.

    AdaLN is around the first and the last. The residual stream keeps the dtype it arrives in
    (float32 at inference), whatever the weights' dtype.
    """

    def __init__(self, config: VarConfig, drop_path: float) -> None:
        super().__init__()
        predictor = config.predictor
        self.norm_eps, self.drop_path = predictor.norm_eps, drop_path
        self.attn = SelfAttention(config)
        if config.text is not None:
            self.cross = CrossAttention(config, config.text)
        self.ffn = FeedForward(config)
        if predictor.shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, predictor.width))
        else:
            self.ada_lin = AdaLinear(predictor.width, 6)

    def forward(
        self,
        x: Tensor,
        modulation_G6C: Tensor,
        past: KeyValue | Tensor | None,
        text: KeyValue | None,
        attend: Attend,
    ) -> tuple[Tensor, KeyValue]:
        """Return (G, L, C) and the keys and values of this block."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation_G6C.unsqueeze(2).unbind(1)
        mixed, cache = self.attn(modulate(x, scale1, shift1, self.norm_eps), past, attend)
        x = x + self._drop_path(gamma1 * mixed.to(x.dtype))
        if text is not None:
            x = x + self._drop_path(self.cross(x, *text).to(x.dtype))
        hidden = self.ffn(modulate(x, scale2, shift2, self.norm_eps))
        return x + self._drop_path(gamma2 * hidden.to(x.dtype)), cache

    def _drop_path(self, x: Tensor) -> Tensor:
        """Return the branch, dropped per row with probability `drop_path` in training."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * torch.empty(x.shape[0], 1, 1, device=x.device).bernoulli_(keep) / keep


def modulate(x_GLC: Tensor, scale_G1C: Tensor, shift_G1C: Tensor, eps: float) -> Tensor:
    """Return LN(x) (1 + scale) + shift; the norm has no affine part and float32 statistics."""
    normed = F.layer_norm(x_GLC.float(), x_GLC.shape[-1:], eps=eps)
    return normed * (scale_G1C + 1) + shift_G1C


class Blocks(nn.ModuleList):
    """The blocks in order; a plain nn.ModuleList would forget their type."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Block]: ...


class HeadNorm(nn.Module):
    """The AdaLN before the head, always with a linear layer of its own."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        width = config.predictor.width
        self.norm_eps = config.predictor.norm_eps
        self.ada_lin = AdaLinear(width, 2)

    def forward(self, x_GLC: Tensor, modulation_G2C: Tensor) -> Tensor:
        """Return the modulated norm (G, L, C)."""
        scale, shift = modulation_G2C.unsqueeze(2).unbind(1)
        return modulate(x_GLC, scale, shift, self.norm_eps)


class NextScaleTransformer(nn.Module):
    """Predicts all tokens of a scale from the scales before it and a condition.

    `condition` once per image, then `step` per scale; `forward` is both, teacher-forced, for
    training.
    """

    # Only training uses the mask; in some files that people share it is zeros.
    RECOMPUTED_BUFFERS = ("attn_bias_for_masking",)

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        self.config = config
        predictor, width = config.predictor, config.predictor.width
        self.pos_start = nn.Parameter(torch.zeros(1, config.patch_nums[0] ** 2, width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.lvl_embed = nn.Embedding(config.num_scales, width)
        self.word_embed = nn.Linear(config.vae.latent_channels, width)
        if config.text is None:
            self.class_emb = nn.Embedding(config.num_classes + 1, width)
        else:
            self._add_text(config.text)
        if predictor.shared_aln:
            self.shared_ada_lin = AdaLinear(width, 6)
        last = max(predictor.depth - 1, 1)
        self.blocks = Blocks(
            Block(config, predictor.drop_path_rate * i / last) for i in range(predictor.depth)
        )
        self.head_nm = HeadNorm(config)
        self.head = nn.Linear(width, config.vae.vocab_size)
        levels = torch.cat([torch.full((side**2,), s) for s, side in enumerate(config.patch_nums)])
        self.register_buffer("lvl_1L", levels[None])
        mask = torch.where(levels[:, None] >= levels[None, :], 0.0, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask[None, None])

    def _add_text(self, text: TextCondition) -> None:
        """Create the parameters that only the text variant has."""
        self.text_pool = nn.Linear(text.text_width, self.config.predictor.width)
        if text.null == "learned":
            self.text_null_states = nn.Parameter(torch.zeros(text.max_tokens, text.text_width))
            self.text_null_pooled = nn.Parameter(torch.zeros(text.text_width))

    def positions(self) -> Tensor:
        """Return the position plus level embedding (L, C) of every token of the schedule."""
        level_1LC: Tensor = self.lvl_embed(self.lvl_1L)
        return (self.pos_1LC + level_1LC).squeeze(0)

    def condition_on_class(self, class_ids_G: Tensor) -> Conditioning:
        """Return the conditioning of class ids (G,); `num_classes` is the null class."""
        return self._condition(self.class_emb(class_ids_G))

    def condition_on_text(
        self, states_NTD: Tensor, pooled_ND: Tensor, rows_G: Tensor
    ) -> Conditioning:
        """Return the conditioning of G rows picked from N encoded prompts.

        With a learned null condition row N is the null row; otherwise the caller encodes "" among
        the prompts.
        """
        if self.config.text is not None and self.config.text.null == "learned":
            states_NTD = torch.cat([states_NTD, self.text_null_states[None].to(states_NTD.dtype)])
            pooled_ND = torch.cat([pooled_ND, self.text_null_pooled[None].to(pooled_ND.dtype)])
        states, pooled = states_NTD[rows_G], pooled_ND[rows_G]
        cond = self.text_pool(pooled.to(self.text_pool.weight.dtype))
        kv = [block.cross.keys_values(states) for block in self.blocks]
        k, v = (torch.stack(tensors) for tensors in zip(*kv, strict=True))
        return self._condition(cond, k, v)

    def _condition(
        self, cond_GC: Tensor, text_k: Tensor | None = None, text_v: Tensor | None = None
    ) -> Conditioning:
        """Return start tokens and AdaLN modulations of the condition vectors (G, C)."""
        if self.config.predictor.shared_aln:
            shared_G6C: Tensor = self.shared_ada_lin(cond_GC)
            modulations = [shared_G6C + block.ada_gss.squeeze(1) for block in self.blocks]
        else:
            modulations = [block.ada_lin(cond_GC) for block in self.blocks]
        head_G2C = self.head_nm.ada_lin(cond_GC)
        start = cond_GC.float()[:, None] + self.pos_start
        return Conditioning(start, torch.stack(modulations), head_G2C, text_k, text_v)

    def step(
        self,
        x_GLC: Tensor,
        positions_L: Tensor,
        conditioning: Conditioning,
        past: Sequence[KeyValue | Tensor | None],
        attend: Attend,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Return float32 logits (G, L, V) of the tokens at `positions_L`, and the keys and values.

        These are returned by `attend`, block by block.
        """
        x = x_GLC + self.positions()[positions_L]
        caches = []
        for i, block in enumerate(self.blocks):
            text = None
            if conditioning.text_k_IGTHK is not None and conditioning.text_v_IGTHK is not None:
                text = conditioning.text_k_IGTHK[i], conditioning.text_v_IGTHK[i]
            x, cache = block(x, conditioning.modulation_IG6C[i], past[i], text, attend)
            caches.append(cache)
        normed = self.head_nm(x, conditioning.head_modulation_G2C)
        return self.head(normed.to(self.head.weight.dtype)).float(), caches

    def forward(self, conditioning: Conditioning, teacher_BLZ: Tensor) -> Tensor:
        """Return the logits (B, L, V) of all scales, block-causally masked.

        `teacher_BLZ` is the tokenizer's `teacher_input`. It may stop after any scale: progressive
        training sees a prefix of the schedule.
        """
        x = torch.cat([conditioning.x_GLC, self.word_embed(teacher_BLZ)], 1)
        length = x.shape[1]
        mask = self.attn_bias_for_masking[:, :, :length, :length]
        positions = torch.arange(length, device=x.device)
        past = [mask] * len(self.blocks)
        return self.step(x, positions, conditioning, past, attend_masked)[0]


def initialize(
    model: NextScaleTransformer,
    *,
    adaln: float = 0.5,
    adaln_gamma: float = 1e-3,
    head: float = 0.02,
) -> None:
    """Fill the parameters as the published trainer does (models/var.py, init_weights).

    Truncated normal of std sqrt(1/(3C)); residual projections over sqrt(2 depth); AdaLN rows of
    gamma times `adaln_gamma`, its other rows times `adaln`; head weight times `head`.
    """
    width, depth = model.config.predictor.width, model.config.predictor.depth
    std = math.sqrt(1 / width / 3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for table in (model.pos_start, model.pos_1LC):
            nn.init.trunc_normal_(table, std=std)
        for name in ("text_null_states", "text_null_pooled"):
            if hasattr(model, name):
                nn.init.normal_(getattr(model, name))
        model.head.weight.mul_(head)
        model.head_nm.ada_lin.linear.weight.mul_(adaln)
        for block in model.blocks:
            for projection in _residual_projections(block):
                projection.weight.div_(math.sqrt(2 * depth))
            if hasattr(block, "ada_gss"):
                block.ada_gss.normal_().div_(math.sqrt(width))
                _initialize_adaln(block.ada_gss.view(6, width), adaln, adaln_gamma)
            else:
                ada = block.ada_lin.linear.weight.view(6, width, width)
                _initialize_adaln(ada, adaln, adaln_gamma)


def _initialize_adaln(rows: Tensor, adaln: float, adaln_gamma: float) -> None:
    """Scale the gamma rows (the first two of six) and the others in place."""
    rows[:2].mul_(adaln_gamma)
    rows[2:].mul_(adaln)


def _residual_projections(block: Block) -> list[nn.Linear]:
    """Return the layers that write into the residual stream."""
    cross = [block.cross.proj] if hasattr(block, "cross") else []
    return [block.attn.proj, block.ffn.fc2, *cross]
