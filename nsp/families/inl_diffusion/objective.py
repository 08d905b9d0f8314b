"""Training losses of the family `inl_diffusion`: the autoencoder, then the transformer.

Axes: B batch, C latent channels, h w latent grid, T prompt tokens, W context width.
Source: Ho et al. 2020, equation 14; the weights of the autoencoder's losses are those of the public
train_vae.py.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from nsp.config import Config
from nsp.data.dataset import ImageDataset, to_model_range
from nsp.data.stream import ShardStream
from nsp.diffusion.noise import Noise
from nsp.errors import ConfigError
from nsp.families.inl_diffusion.perceptual import VggDistance, read_vgg
from nsp.families.inl_diffusion.system import InlSystem
from nsp.families.inl_diffusion.vae import Vae
from nsp.family.objective import Batch, Objective, TokenCache, TrainingData
from nsp.training.data_order import sample_normals, sample_uniforms
from nsp.training.generated import generated
from nsp.training.latents import Conditions, Encoding, LatentDataset
from nsp.training.reconstruction import ReconstructionObjective, psnr_db
from nsp.training.text_states import Reading, TextStates

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VaeSettings(Config):
    """Settings of the autoencoder phase."""

    kl_weight: float = 1e-6  # of the mean over latent values
    vgg: str | None = None  # VGG16's weights, for the perceptual loss; None: no such loss
    perceptual_weight: float = 0.1

    def __post_init__(self) -> None:
        """Check the weights."""
        self.check_reals("objective", "kl_weight", "perceptual_weight", least=0, most=1e6)


class VaeObjective(ReconstructionObjective):
    """Trains the autoencoder to reproduce pictures, as they are and as VGG16 sees them."""

    trained: Vae

    def __init__(self, system: InlSystem, data: TrainingData, settings: VaeSettings) -> None:
        super().__init__(data)
        self.trained, self.settings, self._config = system.vae, settings, system.config
        self.distance: VggDistance | None = None
        if settings.vgg is not None and settings.perceptual_weight:
            self.distance = read_vgg(Path(settings.vgg))

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks of encoder and decoder."""
        return [*self.trained.encoder.down_blocks, *self.trained.decoder.up_blocks]

    def dataset(self) -> Dataset[Mapping[str, object]]:
        """Return the pictures; say once if the loss has no perceptual part."""
        if self.distance is None:
            logger.info(
                "no perceptual loss: the phase has no VGG16 weights (--vgg FILE, a state dict of "
                "torchvision's vgg16), so pictures are compared pixel by pixel"
            )
        return super().dataset()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, its parts, and PSNR in dB."""
        image, vae, settings = to_model_range(batch["image"]), self.trained, self.settings
        mean, log_variance = vae.moments(image)
        latent = mean
        if self.training:
            noise = sample_normals(batch["key"], mean[0].numel()).reshape(mean.shape)
            latent = mean + noise.to(image.device) * (0.5 * log_variance).exp()
        rebuilt = vae.decoder(latent)
        reconstruction = F.mse_loss(rebuilt, image)
        kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()
        loss, parts = reconstruction + settings.kl_weight * kl, dict[str, Tensor]()
        if self.distance is not None:
            perceptual = self.distance(rebuilt, image)
            loss = loss + settings.perceptual_weight * perceptual
            parts = {"perceptual": perceptual.detach()}
        return {
            "loss": loss,
            "reconstruction": reconstruction.detach(),
            **parts,
            "kl": kl.detach(),
            "psnr_db": psnr_db(rebuilt, image),
        }

    def rebuilt(self, image: Tensor) -> Tensor:
        """Return the pictures decoded from the means of the latents."""
        return self.trained.decode(self.trained.encode(image))


@dataclass(frozen=True, kw_only=True)
class DitSettings(Config):
    """Settings of the transformer phase."""

    cond_drop_rate: float = 0.1  # share of the prompts that the null condition replaces
    train_text_encoder: bool = True  # False keeps a pretrained one as it is
    sample_guidance_scale: float = 3.0
    sample_steps: int = 20

    def __post_init__(self) -> None:
        """Check the share."""
        self.check_fractions("objective", "cond_drop_rate")
        self.check_counts("objective", "sample_steps", most=1000)


class DitObjective(Objective):
    """Trains the transformer, and the text encoder with it; the autoencoder is frozen.

    The states of a frozen text encoder are computed once, before the first step.
    """

    kept: Tensor
    needs_captions = True

    def __init__(self, system: InlSystem, data: TrainingData, settings: DitSettings) -> None:
        super().__init__()
        if system.config.control_depth:
            raise ConfigError(
                "a control cannot be trained yet: this phase has no control pictures; leave "
                "control_depth at 0"
            )
        self.settings, self.data = settings, data
        self._empty: Tensor | None = None
        self.system = system.requires_grad_(False)
        parts: dict[str, nn.Module] = {"dit": system.dit}
        if settings.train_text_encoder:
            parts["text_encoder"] = system.text_encoder
        self.trained = nn.ModuleDict(parts).requires_grad_(True)
        if system.config.null_condition == "empty_prompt":
            system.dit.null_embedding.requires_grad_(False)  # the prompt "" stands for no prompt
        kept = torch.from_numpy(system.config.noise.kept()).float()
        self.register_buffer("kept", kept, persistent=False)

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
        captions = data.captions()
        conditions: Conditions
        if self.settings.train_text_encoder:
            conditions = self.system.encode_prompts(captions)
        else:
            conditions = TextStates(reading(self.system), captions, cache)
        return LatentDataset(data, encoding(self.system), conditions, cache, held_out=held_out)

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks of the transformer."""
        return self.system.units()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean squared error of the prediction."""
        system, device = self.system, self.system.dit.null_embedding.device
        if "latents" in batch:
            latent = batch["latents"][0].to(device).float()
        else:
            latent = encode(system, batch["image"])
        uniforms = sample_uniforms(batch["key"], 2).to(device)
        rate = self.settings.cond_drop_rate if self.training else 0.0
        context = self._context(batch, uniforms[:, 0] < rate)
        noise_BChw = (
            sample_normals(batch["key"], latent[0].numel()).to(device).reshape(latent.shape)
        )
        times = (uniforms[:, 1] * len(self.kept)).long().clamp_max(len(self.kept) - 1)
        kept = self.kept[times][:, None, None, None]
        noisy = kept.sqrt() * latent + (1 - kept).sqrt() * noise_BChw
        found = system.dit(noisy, times, context)
        return {
            "loss": F.mse_loss(found.float(), target(system.config.noise, latent, noise_BChw, kept))
        }

    def _context(self, batch: Batch, dropped_B: Tensor) -> Tensor:
        """Return text states (B, T, W), in which the null condition replaces dropped prompts."""
        system, device = self.system, dropped_B.device
        if "condition" in batch and batch["condition"].is_floating_point():
            states = batch["condition"].to(device).float()
            return torch.where(dropped_B[:, None, None], self._null_states(), states)
        if "condition" in batch:
            ids_BT = batch["condition"].to(device)
        else:
            ids_BT = system.encode_prompts(batch["caption"]).to(device)
        if system.config.null_condition == "empty_prompt":
            empty_1T = system.encode_prompts([""]).to(device)
            ids_BT = torch.where(dropped_B[:, None], empty_1T, ids_BT)
        return system.context(ids_BT, dropped_B)

    def _null_states(self) -> Tensor:
        """Return the states (1, T, W) of the null condition; those of "" are computed once."""
        if self.system.config.null_condition == "learned":
            return self.system.dit.null_embedding
        if self._empty is None:
            self._empty = reading(self.system).states(self.system.encode_prompts([""]))
        return self._empty

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return False for biases, norms, tables of embeddings and the null condition."""
        return parameter.ndim > 1 and "embedding" not in name

    @torch.no_grad()
    def samples(self, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Return pictures generated for captions of the data set."""
        return generated(
            self.system,
            self.data.pictures,
            seed,
            guidance_scale=self.settings.sample_guidance_scale,
            num_inference_steps=self.settings.sample_steps,
        )


def target(noise: Noise, latent: Tensor, noise_BChw: Tensor, kept: Tensor) -> Tensor:
    """Return what a model is to predict of a noisy latent."""
    match noise.prediction:
        case "epsilon":
            return noise_BChw
        case "v_prediction":
            return kept.sqrt() * noise_BChw - (1 - kept).sqrt() * latent
        case "sample":
            return latent


@torch.no_grad()
def encode(system: InlSystem, image_B3HW: Tensor) -> Tensor:
    """Return the latents (B, C, h, w) of uint8 pictures: the means, in float32."""
    with torch.autocast(image_B3HW.device.type, enabled=False):
        return system.vae.encode(to_model_range(image_B3HW)).float()


def reading(system: InlSystem) -> Reading:
    """Return how captions become text states, in float32."""

    @torch.no_grad()
    def states(ids_NT: Tensor) -> Tensor:
        device = system.dit.null_embedding.device
        with torch.autocast(device.type, enabled=False):
            kept_N = torch.zeros(len(ids_NT), dtype=torch.bool, device=device)
            return system.context(ids_NT.to(device), kept_N)

    return Reading(system.text_encoder, system.encode_prompts, states)


def encoding(system: InlSystem) -> Encoding:
    """Return how pictures become latents; the decoder does not decide them."""
    return Encoding(
        system.vae,
        lambda image: [encode(system, image)],
        about=(system.config.vae,),
        decides=lambda name: not name.startswith("decoder."),
    )
