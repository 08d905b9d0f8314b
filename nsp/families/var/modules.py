"""The stages of the family `var` as torch modules: what is exported and what backend `torch` runs.

Each takes the tensors its StageIO declares, in order, and returns a tuple in order; axes as in
stages.py.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.families.var.model import Conditioning
from nsp.families.var.quantizer import Phi
from nsp.families.var.stages import needs_nucleus_stages
from nsp.families.var.system import VarSystem
from nsp.layers.attention import attend_delta, attend_present
from nsp.layers.logits import (
    apply_guidance,
    filter_by_mass,
    filter_by_rank,
    sample_by_inverse_cdf,
)
from nsp.text.encoder import TextEncoderStage

# Scaled logits, top-p, top-k, ranks -> filtered logits.
Filter: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def build_stages(system: VarSystem, kv_layout: str) -> Mapping[str, nn.Module]:
    """Return the stages of `system`, sharing its weights."""
    stages: dict[str, nn.Module] = {}
    if system.text_encoder is not None:
        stages["text_encoder"] = TextEncoderStage(system.text_encoder)
    stages |= {
        "condition": TextConditionStage(system)
        if system.config.text
        else ClassConditionStage(system),
        "step": StepStage(system, kv_layout),
        "select": SelectStage(system),
        "select_smooth": SelectSmoothStage(system),
        "accumulate": AccumulateStage(system),
        "decoder": DecoderStage(system),
    }
    if needs_nucleus_stages(system.config, kv_layout):
        stages["select_nucleus"] = SelectStage(system, filter_by_mass)
        stages["select_smooth_nucleus"] = SelectSmoothStage(system, filter_by_mass)
    return {name: stage.eval() for name, stage in stages.items()}


class ClassConditionStage(nn.Module):
    """Class ids -> start tokens and AdaLN modulations."""

    def __init__(self, system: VarSystem) -> None:
        super().__init__()
        self.predictor = system.predictor

    def forward(self, class_ids_G: Tensor) -> tuple[Tensor, ...]:
        """Return x, modulation, head_modulation."""
        c = self.predictor.condition_on_class(class_ids_G)
        return c.x_GLC, c.modulation_IG6C, c.head_modulation_G2C


class TextConditionStage(nn.Module):
    """Encoded prompts -> start tokens, AdaLN modulations, text keys and values."""

    def __init__(self, system: VarSystem) -> None:
        super().__init__()
        self.predictor = system.predictor

    def forward(
        self, text_states_NTD: Tensor, text_pooled_ND: Tensor, rows_G: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return x, modulation, head_modulation, text_k, text_v."""
        c = self.predictor.condition_on_text(text_states_NTD, text_pooled_ND, rows_G)
        return c.x_GLC, c.modulation_IG6C, c.head_modulation_G2C, c.text_k_IGTHK, c.text_v_IGTHK


class StepStage(nn.Module):
    """One scale step of the transformer."""

    def __init__(self, system: VarSystem, kv_layout: str) -> None:
        super().__init__()
        self.predictor = system.predictor
        self.has_text = system.config.text is not None
        self.attend = attend_delta if kv_layout == "delta" else attend_present

    def forward(
        self,
        x_GLC: Tensor,
        positions_L: Tensor,
        modulation_IG6C: Tensor,
        head_modulation_G2C: Tensor,
        *text_and_past: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return logits, then new keys and values of every block."""
        num_text = 2 if self.has_text else 0
        text, past = text_and_past[:num_text], text_and_past[num_text:]
        conditioning = Conditioning(x_GLC, modulation_IG6C, head_modulation_G2C, *text)
        pairs = list(zip(past[::2], past[1::2], strict=True))
        logits, caches = self.predictor.step(x_GLC, positions_L, conditioning, pairs, self.attend)
        return logits, *(tensor for cache in caches for tensor in cache)


class SelectStage(nn.Module):
    """Guidance, filtering, one draw per token, codebook lookup; all in float32."""

    def __init__(self, system: VarSystem, keep: Filter = filter_by_rank) -> None:
        super().__init__()
        self.embedding, self.keep = system.vae.quantize.embedding, keep

    def draw(
        self,
        logits_GLV: Tensor,
        uniforms_BL: Tensor,
        guidance_B: Tensor,
        temperature_B: Tensor,
        top_p_B: Tensor,
        top_k_B: Tensor,
        ranks_R: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (B, L), what they were drawn from and the guided logits (B, L, V)."""
        guided = apply_guidance(logits_GLV, guidance_B)
        scaled = guided / temperature_B.reshape(-1, 1, 1)
        filtered = self.keep(scaled, top_p_B, top_k_B, ranks_R)
        return sample_by_inverse_cdf(filtered, uniforms_BL), filtered, guided

    def forward(
        self, logits_GLV: Tensor, uniforms_BL: Tensor, forced_BL: Tensor, *settings: Tensor
    ) -> tuple[Tensor, ...]:
        """Return tokens, codes, guided."""
        tokens, _, guided = self.draw(logits_GLV, uniforms_BL, *settings)
        taken = torch.where(forced_BL >= 0, forced_BL, tokens)
        return tokens, self.embedding(taken), guided


class SelectSmoothStage(SelectStage):
    """As SelectStage, with codes mixed by a Gumbel softmax that sharpens over the scales.

    Source: github.com/FoundationVision/VAR, models/var.py, autoregressive_infer_cfg. Not for
    measuring FID.
    """

    def forward(
        self, logits_GLV: Tensor, uniforms_BL: Tensor, forced_BL: Tensor, *settings: Tensor
    ) -> tuple[Tensor, ...]:
        """Return tokens, codes, guided; the noise and its ratio come last."""
        *settings_alone, gumbel_BLV, ratio = settings
        tokens, filtered, guided = self.draw(logits_GLV, uniforms_BL, *settings_alone)
        tau = (0.27 * (1 - 0.95 * ratio)).clamp_min(0.005)
        weights = ((filtered * (1 + ratio) + gumbel_BLV) / tau).softmax(-1)
        mixed = weights @ self.embedding.weight
        exact = self.embedding(forced_BL.clamp_min(0))
        return tokens, torch.where((forced_BL >= 0)[..., None], exact, mixed), guided


class AccumulateStage(nn.Module):
    """f_hat += phi(bicubic(codes)); the next scale's input is the area-averaged f_hat.

    One graph serves every scale: the resizing matrices are inputs, and all phis are applied as one
    convolution of which one slice is taken (a few MFLOP), so that the weights stay constants of the
    graph. All in float32.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, system: VarSystem) -> None:
        super().__init__()
        quantize = system.vae.quantize
        phis = [module for module in quantize.quant_resi.modules() if isinstance(module, Phi)]
        self.word_embed = system.predictor.word_embed
        self.strength = phis[0].strength if phis else 0.0
        self.num_phis = len(phis)
        if phis:
            self.register_buffer("weight", torch.cat([phi.weight.detach() for phi in phis]))
            self.register_buffer("bias", torch.cat([phi.bias.detach() for phi in phis]))

    def forward(
        self,
        codes_BpqZ: Tensor,
        latent_BZhw: Tensor,
        up_rows: Tensor,
        up_cols: Tensor,
        down_rows: Tensor,
        down_cols: Tensor,
        phi: Tensor,
        rows_G: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return new_latent, x."""
        added = up_rows @ codes_BpqZ.permute(0, 3, 1, 2) @ up_cols.transpose(0, 1)
        if self.num_phis:
            by_phi = F.conv2d(added, self.weight, self.bias, padding=1)
            by_phi = torch.unflatten(by_phi, 1, (self.num_phis, -1))
            smoothed = by_phi.index_select(1, phi.reshape(1)).squeeze(1)
            added = (1 - self.strength) * added + self.strength * smoothed
        latent = latent_BZhw + added
        next_map = down_rows @ latent @ down_cols.transpose(0, 1)
        tokens = self.word_embed(next_map.flatten(2).transpose(1, 2))
        return latent, tokens.index_select(0, rows_G)


class DecoderStage(nn.Module):
    """Latent -> pixels."""

    def __init__(self, system: VarSystem) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = system.vae.post_quant_conv, system.vae.decoder

    def forward(self, latent_BZhw: Tensor) -> tuple[Tensor]:
        """Return the image (B, 3, H, W) in [0, 1]."""
        latent = latent_BZhw.to(self.post_quant_conv.weight.dtype)
        image: Tensor = self.decoder(self.post_quant_conv(latent))
        return ((image.float().clamp(-1, 1) + 1) * 0.5,)
