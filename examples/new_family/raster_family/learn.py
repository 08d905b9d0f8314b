"""What needs torch: the network, the stages as modules, the loss. Axes: B images, V levels."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.errors import ConfigError
from nsp.family.contract import Learner
from nsp.family.objective import Batch, TrainingData
from nsp.family.system import System
from nsp.layers.logits import sample_by_inverse_cdf
from nsp.training.generated import GeneratorObjective
from raster_family import RasterConfig, RasterSampling


class CausalConv(nn.Conv2d):
    """A 7x7 convolution of what comes before its centre (van den Oord et al., arXiv:1601.06759)."""

    def __init__(self, width_in: int, width_out: int, *, centre: bool) -> None:
        super().__init__(width_in, width_out, 7, padding=3)
        seen = (torch.arange(49) < 24 + centre).reshape(7, 7)
        self.register_buffer("seen", seen, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width_out, h, w) in float32, computed in the dtype of the weights."""
        weight = self.weight * self.get_buffer("seen").to(self.weight.dtype)
        return F.conv2d(x.to(weight.dtype), weight, self.bias, padding=3).float()


class RasterSystem(System):
    """All that a checkpoint holds: `net`, from a canvas to logits (B, V, h, w) of all pixels."""

    family: ClassVar[str] = "raster"
    config: RasterConfig

    def __init__(self, config: RasterConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = [CausalConv(1, config.width, centre=False), nn.GELU()]
        for _ in range(config.depth):
            layers += [CausalConv(config.width, config.width, centre=True), nn.GELU()]
        self.net = nn.Sequential(*layers, CausalConv(config.width, config.num_levels, centre=True))


class StepStage(nn.Module):
    """Canvas, position -> the logits (B, 1, V) of that pixel."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, canvas: Tensor, position: Tensor) -> tuple[Tensor]:
        """Return logits."""
        return (self.net(canvas).flatten(2).index_select(2, position).transpose(1, 2),)


class SelectStage(nn.Module):
    """Canvas, position, logits, uniforms and settings -> the canvas with one pixel more."""

    def forward(
        self, canvas: Tensor, position: Tensor, logits: Tensor, *draw: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return new_canvas, tokens, guided."""
        uniforms, temperature, ink_bias = draw
        ink = torch.linspace(0, 1, logits.shape[2], device=logits.device)
        guided = logits + ink_bias[:, None, None] * ink
        tokens = sample_by_inverse_cdf(guided / temperature[:, None, None], uniforms)
        pixels = canvas.flatten(1)
        here = torch.arange(pixels.shape[1], device=canvas.device) == position
        return torch.where(here, ink[tokens], pixels).reshape(canvas.shape), tokens, guided


class DecoderStage(nn.Module):
    """Canvas -> a grey picture (B, 3, h, w) in [0, 1]."""

    def forward(self, latent: Tensor) -> tuple[Tensor]:
        """Return the image."""
        return ((1 - latent).repeat(1, 3, 1, 1),)


class PixelsObjective(GeneratorObjective):
    """Cross entropy of every pixel's level of ink, given the pixels before it."""

    system: RasterSystem

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, in nats per pixel."""
        most = self.system.config.num_levels - 1
        ink_B1hw = 1 - batch["image"].float().mean(1, keepdim=True) / 255
        levels_B1hw = (ink_B1hw * most).round()
        return {"loss": F.cross_entropy(self.trained(levels_B1hw / most), levels_B1hw[:, 0].long())}


class RasterLearner(Learner[RasterConfig, RasterSampling, RasterSystem]):
    """What nsp asks for where torch is installed."""

    parts: ClassVar[tuple[str, ...]] = ("net",)

    def build(self, config: RasterConfig, **text: object) -> RasterSystem:
        """Return a system; it reads no text."""
        return RasterSystem(config)

    def modules(self, system: RasterSystem, kv_layout: str) -> Mapping[str, nn.Module]:
        """Return a module for every stage."""
        return {"step": StepStage(system.net), "select": SelectStage(), "decoder": DecoderStage()}

    def objective(
        self, phase: str, settings: Mapping[str, object], system: RasterSystem, data: TrainingData
    ) -> PixelsObjective:
        """Return the objective of the one phase."""
        if phase != "pixels" or settings:
            raise ConfigError(f"family raster has one phase, pixels, and no settings of {phase}")
        return PixelsObjective(system, system.net, data)
