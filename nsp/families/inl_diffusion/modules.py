"""The stages of the family `inl_diffusion` as torch modules; axes as in stages.py."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nsp.families.inl_diffusion.system import InlSystem
from nsp.families.inl_diffusion.text import text_stage
from nsp.layers.attention import KeyValue
from nsp.layers.logits import apply_guidance
from nsp.layers.rotary import joined_turns


def build_stages(system: InlSystem) -> Mapping[str, nn.Module]:
    """Return the stages of `system`, sharing its weights."""
    found: dict[str, nn.Module] = {
        "text_encoder": text_stage(system.config.text, system.text_encoder),
        "condition": ConditionStage(system),
        "modulation": (
            SummaryModulationStage(system)
            if system.config.dit.pooled_width
            else ModulationStage(system)
        ),
        **({"control": ControlStage(system)} if system.config.control_depth else {}),
        "denoise": DenoiseStage(system),
        "blend": BlendStage(),
        "decoder": DecoderStage(system),
        "encoder": EncoderStage(system),
    }
    return {name: stage.eval() for name, stage in found.items()}


class ConditionStage(nn.Module):
    """Encoded prompts -> the text's keys and values of every row and block; row N is null."""

    def __init__(self, system: InlSystem) -> None:
        super().__init__()
        self.dit = system.dit

    def forward(self, states_NTW: Tensor, prompts_G: Tensor) -> tuple[Tensor, ...]:
        """Return cross_k_0, cross_v_0, cross_k_1, ..."""
        pairs = self.dit.read(torch.cat([states_NTW, self.dit.null_embedding]))
        return tuple(each.index_select(0, prompts_G) for pair in pairs for each in pair)


class ModulationStage(nn.Module):
    """Timesteps -> modulation."""

    def __init__(self, system: InlSystem) -> None:
        super().__init__()
        self.dit = system.dit

    def forward(self, timestep_S: Tensor) -> tuple[Tensor]:
        """Return modulation (S, M)."""
        return (self.dit.modulation(timestep_S),)


class SummaryModulationStage(nn.Module):
    """One timestep and the prompts' summaries -> modulation of every row."""

    def __init__(self, system: InlSystem) -> None:
        super().__init__()
        self.dit = system.dit

    def forward(self, timestep_1: Tensor, states_NTW: Tensor, prompts_G: Tensor) -> tuple[Tensor]:
        """Return modulation (G, M)."""
        states = torch.cat([states_NTW, self.dit.null_embedding]).index_select(0, prompts_G)
        return (self.dit.modulation(timestep_1, states),)


class DenoiseStage(nn.Module):
    """One step of a sampler (nsp/diffusion/samplers.py), guided."""

    def __init__(self, system: InlSystem) -> None:
        super().__init__()
        self.dit = system.dit

    def forward(
        self,
        row_turns: Tensor,
        column_turns: Tensor,
        rows: Tensor,
        guidance: Tensor,
        rescale: Tensor,
        coefficients: Tensor,
        modulation: Tensor,
        latent: Tensor,
        x0_1: Tensor,
        x0_2: Tensor,
        noise: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return new_latent, x0 and the integrators' gate (B, y, x)."""
        cells, num_keys = latent.shape, 2 * len(self.dit.blocks)
        latent, x0_1, x0_2, noise = (
            each.flatten(4).flatten(2, 3) for each in (latent, x0_1, x0_2, noise)
        )
        a, b, c, d, e, f0, f1, f2, n, scale = coefficients[..., None, None, None].unbind(1)
        found, gate = self.dit.predict(
            (latent * scale).index_select(0, rows),
            modulation,
            _pairs(others[:num_keys]),
            joined_turns(row_turns, column_turns),
            [each.flatten(1, 2) for each in others[num_keys:]],
        )
        prediction = guided(found, guidance, rescale)
        x0 = torch.minimum(torch.maximum(a * latent + b * prediction, -c), c)
        new = d * latent + e * prediction + f0 * x0 + f1 * x0_1 + f2 * x0_2 + n * noise
        gate = gate[: latent.shape[0]].unflatten(1, (row_turns.shape[0], column_turns.shape[0]))
        return new.reshape(cells), x0.reshape(cells), gate


class ControlStage(nn.Module):
    """What a control picture adds to the step of the same latent."""

    def __init__(self, system: InlSystem) -> None:
        super().__init__()
        self.dit = system.dit

    def forward(
        self,
        row_turns: Tensor,
        column_turns: Tensor,
        rows: Tensor,
        coefficients: Tensor,
        modulation: Tensor,
        latent: Tensor,
        control: Tensor,
        *keys: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return added_0, added_1, ... (G, y, x, D)."""
        latent, control = (each.flatten(4).flatten(2, 3) for each in (latent, control))
        scale = coefficients[:, -1, None, None, None]
        found = self.dit.controlled(
            (latent * scale).index_select(0, rows),
            control.index_select(0, rows),
            modulation,
            _pairs(keys),
            joined_turns(row_turns, column_turns),
        )
        grid = (row_turns.shape[0], column_turns.shape[0])
        return tuple(each.unflatten(1, grid) for each in found)


def _pairs(tensors: Sequence[Tensor]) -> list[KeyValue]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def guided(found_G: Tensor, guidance_B: Tensor, rescale_B: Tensor) -> Tensor:
    """Return the guided prediction (B, ...), its spread partly set back to the conditional one's.

    Source: Lin et al. 2024, arXiv:2305.08891, section 3.4.
    """
    conditional = found_G[: guidance_B.shape[0]]
    plain = apply_guidance(found_G, guidance_B)
    axes, rescale = (1, 2, 3), rescale_B[:, None, None, None]
    ratio = conditional.std(axes, keepdim=True) / plain.std(axes, keepdim=True)
    return torch.where(rescale == 0, plain, plain * (rescale * ratio + (1 - rescale)))


class BlendStage(nn.Module):
    """A given picture outside of the mask."""

    def forward(
        self,
        latent_BChw: Tensor,
        kept_BChw: Tensor,
        noise_BChw: Tensor,
        mask_B1hw: Tensor,
        level_B2: Tensor,
    ) -> tuple[Tensor]:
        """Return new_latent."""
        signal, sigma = level_B2[..., None, None, None].unbind(1)
        kept = signal * kept_BChw + sigma * noise_BChw
        return (mask_B1hw * latent_BChw + (1 - mask_B1hw) * kept,)


class DecoderStage(nn.Module):
    """Latent -> pixels."""

    def __init__(self, system: InlSystem) -> None:
        super().__init__()
        self.vae = system.vae

    def forward(self, latent_BChw: Tensor) -> tuple[Tensor]:
        """Return the image (B, 3, H, W) in [0, 1]."""
        return (((self.vae.decode(latent_BChw) + 1) * 0.5).clamp(0, 1),)


class EncoderStage(nn.Module):
    """Pixels -> latent."""

    def __init__(self, system: InlSystem) -> None:
        super().__init__()
        self.vae = system.vae

    def forward(self, image_B3HW: Tensor) -> tuple[Tensor]:
        """Return the mean of the latent of a picture in [0, 1]."""
        return (self.vae.encode(image_B3HW * 2 - 1),)
