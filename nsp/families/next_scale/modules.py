"""The stages of the family `next_scale` as torch modules: what is exported and what PyTorch runs.

Each takes the tensors its StageIO declares, in order, and returns a tuple in order; axes as in
stages.py.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from nsp.families.next_scale.stages import predictor_stage
from nsp.families.next_scale.system import NextScaleSystem, TextMeanStage
from nsp.layers.logits import apply_guidance


def build_stages(system: NextScaleSystem, kv_layout: str) -> Mapping[str, nn.Module]:
    """Return the stages of `system`, sharing its weights."""
    assert kv_layout == "delta", kv_layout
    generator = system.generator
    stages: dict[str, nn.Module] = {
        "text_encoder": TextStage(system),
        "condition": ConditionStage(system),
        "base": BaseStage(system),
        **{predictor_stage(k): PredictorStage(p) for k, p in enumerate(generator.predictors)},
        "refine": RefineStage(system),
        "decoder": DecoderStage(system),
    }
    return {name: stage.eval() for name, stage in stages.items()}


class TextStage(nn.Module):
    """Prompts -> mean token states."""

    def __init__(self, system: NextScaleSystem) -> None:
        super().__init__()
        self.mean = TextMeanStage(system.text_encoder)

    def forward(self, token_ids_NT: Tensor) -> tuple[Tensor]:
        """Return text_mean."""
        return (self.mean(token_ids_NT),)


class ConditionStage(nn.Module):
    """Mean token states -> condition vectors."""

    def __init__(self, system: NextScaleSystem) -> None:
        super().__init__()
        self.condition = system.generator.condition

    def forward(self, text_mean_ND: Tensor, rows_G: Tensor) -> tuple[Tensor]:
        """Return condition."""
        return (self.condition(text_mean_ND, rows_G),)


class BaseStage(nn.Module):
    """One Euler step of the flow, or the whole regression; guidance in float32."""

    def __init__(self, system: NextScaleSystem) -> None:
        super().__init__()
        self.base = system.generator.base

    def forward(
        self,
        latent_BChw: Tensor,
        condition_GD: Tensor,
        rows_G: Tensor,
        guidance_B: Tensor,
        time: Tensor | None = None,
        step_size: Tensor | None = None,
    ) -> tuple[Tensor]:
        """Return new_latent."""
        latent_GChw = latent_BChw.index_select(0, rows_G)
        if time is None or step_size is None:
            found = self.base(latent_GChw, condition_GD, None)
            return (apply_guidance(found, guidance_B),)
        velocity = self.base(latent_GChw, condition_GD, time.reshape(1))
        guided = apply_guidance(velocity, guidance_B)
        return (latent_BChw + step_size * guided,)


class PredictorStage(nn.Module):
    """One upscaling step."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(
        self, latent_BChw: Tensor, condition_BD: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Return new_latent, then new keys and values of every block."""
        pairs = list(zip(past[::2], past[1::2], strict=True))
        latent, grown = self.predictor(latent_BChw, condition_BD, pairs)
        return latent, *(tensor for cache in grown for tensor in cache)


class RefineStage(nn.Module):
    """The correction of the last latent."""

    def __init__(self, system: NextScaleSystem) -> None:
        super().__init__()
        self.refine = system.generator.refine

    def forward(self, latent_BChw: Tensor) -> tuple[Tensor]:
        """Return new_latent."""
        return (self.refine(latent_BChw),)


class DecoderStage(nn.Module):
    """Latent of any side -> pixels."""

    def __init__(self, system: NextScaleSystem) -> None:
        super().__init__()
        self.vae = system.vae

    def forward(self, latent_BChw: Tensor) -> tuple[Tensor]:
        """Return the image (B, 3, H, W) in [0, 1]."""
        return ((self.vae.decode(latent_BChw).clamp(-1, 1) + 1) * 0.5,)
