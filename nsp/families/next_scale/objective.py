"""Training losses of the family `next_scale`: the autoencoder, then the scales, all or some.

Axes: B batch, C latent channels, D condition width, T prompt tokens. Every scale is taught with the
true latent of the scale before, made noisy so that errors of earlier scales are tolerated; the base
by rectified flow (Liu et al. 2022, arXiv:2209.03003, eq. 1) or by plain regression from noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from nsp.config import Config
from nsp.data.dataset import ImageDataset, to_model_range
from nsp.data.stream import ShardStream
from nsp.families.next_scale.config import ScalesSettings
from nsp.families.next_scale.latents import encode_scales, encoding, resized
from nsp.families.next_scale.model import FeatureBlock, NextScaleGenerator, grow
from nsp.families.next_scale.system import NextScaleSystem
from nsp.families.next_scale.vae import Vae, decode
from nsp.family.objective import Batch, Objective, TokenCache, TrainingData
from nsp.layers.attention import KeyValue
from nsp.training.data_order import sample_normals, sample_uniforms
from nsp.training.latents import LatentDataset
from nsp.training.reconstruction import ReconstructionObjective, image_gradient_loss, psnr_db


@dataclass(frozen=True, kw_only=True)
class VaeSettings(Config):
    """Settings of the autoencoder phase."""

    gradient_weight: float = 1.0  # of the L1 between image gradients: keeps edges sharp
    kl_weight: float = 1e-4  # of the mean over latent values
    coarse_weight: float = 0.25  # of each smaller size, which later gives the coarse latents


class VaeObjective(ReconstructionObjective):
    """Trains the autoencoder to reproduce pictures, at the size of every scale."""

    trained: Vae

    def __init__(
        self,
        system: NextScaleSystem,
        data: TrainingData,
        settings: VaeSettings,
    ) -> None:
        super().__init__(data)
        self.trained, self.settings, self._config = system.vae, settings, system.config
        self._squares: list[Tensor] = []  # mean squares of the current step's latents

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, its parts at full size, and PSNR in dB."""
        image, settings = to_model_range(batch["image"]), self.settings
        config = self._config
        noise = sample_normals(batch["key"], config.vae.latent_channels * config.latent_side**2)
        side = config.latent_side
        noise = noise.reshape(len(noise), -1, side, side).to(image.device)
        total = torch.zeros((), device=image.device)
        report: dict[str, Tensor] = {}
        for side in config.sides:
            full = side == config.latent_side
            picture = resized(image, side * config.vae.downsampling)
            report = self._rebuild(picture, noise[:, :, :side, :side])
            total = total + report["loss"] * (1.0 if full else settings.coarse_weight)
        return {**report, "loss": total}

    def _rebuild(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return the loss of one size."""
        autoencoder, settings = self.trained.autoencoder, self.settings
        found = autoencoder.encode(image).latent_dist
        mean, std = found.mean.float(), found.std.float()
        if self.training and image.shape[-1] == self._config.target_size:
            self._squares.append(mean.detach().square().mean())
        rebuilt = decode(autoencoder, mean + std * noise if self.training else mean)
        l1, gradient = F.l1_loss(rebuilt, image), image_gradient_loss(rebuilt, image)
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        loss = l1 + settings.gradient_weight * gradient + settings.kl_weight * kl
        parts = {"l1": l1.detach(), "kl": kl.detach(), "psnr_db": psnr_db(rebuilt, image)}
        return {"loss": loss, **parts}

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float | Tensor]:
        """Let the scaling factor follow the latents, so that theirs is unit variance."""
        square, self._squares = torch.stack(self._squares).mean(), []
        factor = reduce(square, "mean").rsqrt()
        self.trained.scaling_factor.lerp_(factor, 1.0 if step == 0 else 0.05)
        return {"scaling_factor": self.trained.scaling_factor.clone()}

    def rebuilt(self, image: Tensor) -> Tensor:
        """Return the pictures decoded from the means of the latents."""
        return self.trained.decode(self.trained.encode(image))


class ScalesObjective(Objective):
    """Trains the base, predictors, or some of them, and the condition with the base.

    The autoencoder and all other scales are frozen.
    """

    needs_captions = True

    def __init__(
        self,
        system: NextScaleSystem,
        data: TrainingData,
        settings: ScalesSettings,
    ) -> None:
        super().__init__()
        self.settings, self.data = settings, data
        self.scales = settings.scales(system.config)
        self.system = system.requires_grad_(False)
        generator, parts = system.generator, dict[str, nn.Module]()
        if 0 in self.scales:
            parts |= {"base": generator.base, "condition": generator.condition}
        text = settings.train_text_encoder
        if 0 in self.scales if text is None else text:
            assert system.text_encoder is not None  # a system without one is not built
            parts["text_encoder"] = system.text_encoder
        for scale in self.scales:
            if scale:
                parts[f"predictor_{scale - 1}"] = generator.predictors[scale - 1]
        if self.scales[-1] == system.config.num_scales - 1:
            parts["refine"] = generator.refine
        self.trained = nn.ModuleDict(parts).requires_grad_(True)

    def dataset(self) -> Dataset[Mapping[str, object]]:
        """Return prompts with latents, or the pictures of a stream."""
        if isinstance(self.data.pictures, ShardStream):
            return self.data.pictures
        return self._latents(self.data.pictures, self.data.cache)

    def held_out(self) -> Dataset[Mapping[str, object]] | None:
        """Return the held-out pictures as `dataset` does."""
        if self.data.held_out is None:
            return None
        return self._latents(self.data.held_out, held_out=True)

    def _latents(
        self, data: ImageDataset, cache: TokenCache | None = None, *, held_out: bool = False
    ) -> LatentDataset:
        prompts = self.system.encode_prompts(data.captions())
        return LatentDataset(data, encoding(self.system), prompts, cache, held_out=held_out)

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks of base and predictors."""
        return [m for m in self.trained.modules() if isinstance(m, FeatureBlock)]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss and each scale's loss; for held-out pictures also the chain's error."""
        system = self.system
        config, keys = system.config, batch["key"]
        device = next(system.generator.parameters()).device
        if "latents" in batch:
            latents = [latent.to(device).float() for latent in batch["latents"]]
        else:
            latents = encode_scales(system, batch["image"])
        uniforms = sample_uniforms(keys, 2 + config.num_predictors).to(device)
        rate = config.generator.cond_drop_rate if self.training else 0.0
        condition = system.condition(self._prompts(batch, device), uniforms[:, 0] < rate)
        noises = self._noises(keys, device)
        losses: dict[str, Tensor] = {}
        if 0 in self.scales:
            losses["scale_0"] = self._base_loss(latents[0], condition, noises[0], uniforms[:, 1])
        losses |= self._predictor_losses(latents, condition, noises[1:], uniforms[:, 2:])
        report = {name: loss.detach() for name, loss in losses.items()}
        if "held_out" in batch and bool(batch["held_out"].all()):
            report |= chain_errors(system.generator, latents, condition, self.scales)
        return {"loss": torch.stack(list(losses.values())).sum(), **report}

    def _prompts(self, batch: Batch, device: torch.device) -> Tensor:
        if "condition" in batch:
            tokens: Tensor = batch["condition"]
            return tokens
        return self.system.encode_prompts(batch["caption"]).to(device)

    def _noises(self, keys_B: Tensor, device: torch.device) -> list[Tensor]:
        """Return standard-normal latents: for the base, then for every predictor's input."""
        config = self.system.config
        channels = config.vae.latent_channels
        sides = (config.initial_size, *config.sides[:-1])
        flat = sample_normals(keys_B, sum(channels * side**2 for side in sides)).to(device)
        parts = torch.split(flat, [channels * side**2 for side in sides], 1)
        return [p.reshape(-1, channels, s, s) for p, s in zip(parts, sides, strict=True)]

    def _base_loss(
        self, latent: Tensor, condition: Tensor, noise: Tensor, time_B: Tensor
    ) -> Tensor:
        """Return the loss of the first latent."""
        base = self.system.generator.base
        if self.system.config.generator.base == "regression":
            return latent_loss(base(noise, condition, None), latent)
        time = time_B[:, None, None, None]
        velocity = base((1 - time) * noise + time * latent, condition, time_B)
        return F.mse_loss(velocity.float(), latent - noise)

    def _predictor_losses(
        self, latents: list[Tensor], condition: Tensor, noises: list[Tensor], uniforms: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of the predictors among the scales, and of the refinement."""
        generator, losses = self.system.generator, dict[str, Tensor]()
        past: list[KeyValue] = []
        for k, predictor in enumerate(generator.predictors[: self.scales[-1]]):
            learns = k + 1 in self.scales
            deviation = self.settings.noise * uniforms[:, k, None, None, None]
            source = latents[k] + (deviation * noises[k] if self.training else 0)
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                found, new = predictor(source, condition, past)
            past = grow(past, new)
            if learns:
                losses[f"scale_{k + 1}"] = latent_loss(found, latents[k + 1])
                if k + 1 == len(latents) - 1:
                    losses["refined"] = latent_loss(generator.refine(found), latents[-1])
        return losses

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return False for biases, norms, tables of embeddings and the null condition."""
        return parameter.ndim > 1 and "embedding" not in name

    @torch.no_grad()
    def samples(self, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Return pictures generated for captions of the data set, up to the last trained scale."""
        from nsp.families.next_scale.samples import sample_grid

        guidance = self.settings.sample_guidance_scale
        return sample_grid(
            self.system, self.data.pictures, seed, guidance, last_scale=self.scales[-1]
        )


def latent_loss(found: Tensor, expected: Tensor) -> Tensor:
    """Return L1 plus mean squared error, in float32."""
    difference = found.float() - expected.float()
    return difference.abs().mean() + difference.square().mean()


@torch.no_grad()
def chain_errors(
    generator: NextScaleGenerator, latents: list[Tensor], condition: Tensor, scales: range
) -> dict[str, Tensor]:
    """Return the mean absolute error of latents grown from the true first one, step on step."""
    grown = generator(latents[0], condition)
    return {f"chain_{k}": (grown[k].float() - latents[k]).abs().mean() for k in scales if k > 0}
