"""The decoder phase of the family `var`: encoder and codes stay, the decoder learns to draw them.

Tokens do not change, so it may follow the predictor, as the decoders of latent diffusion models are
tuned after the rest (Rombach et al. 2022, arXiv:2112.10752, and the ft-MSE decoder released later).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.config import Config
from nsp.data.dataset import to_model_range
from nsp.families.var.system import VarSystem
from nsp.families.var.tokenizer_objective import check_prefix_share, decoded_latents
from nsp.family.objective import Batch, TrainingData
from nsp.training.reconstruction import ReconstructionObjective, image_gradient_loss, psnr_db


@dataclass(frozen=True, kw_only=True)
class DecoderSettings(Config):
    """Settings of the decoder phase."""

    # In addition to the mean squared error, which alone would blur edges.
    gradient_weight: float = 0.05
    prefix_share: float = 0.0  # as in TokenizerSettings

    def __post_init__(self) -> None:
        """Check the share."""
        check_prefix_share(self.prefix_share)


class DecoderObjective(ReconstructionObjective):
    """Trains the decoder on tokens that stay as they are."""

    keeps_latents = True

    def __init__(
        self,
        system: VarSystem,
        data: TrainingData,
        settings: DecoderSettings,
    ) -> None:
        super().__init__(data)
        self.settings, self._vae = settings, system.vae.requires_grad_(False)
        parts = {"decoder": self._vae.decoder, "post_quant_conv": self._vae.post_quant_conv}
        self.trained = nn.ModuleDict(parts).requires_grad_(True)

    def units(self) -> Sequence[nn.Module]:
        """Return the levels of the decoder."""
        return list(self._vae.decoder.up)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, its mean squared error, and PSNR in dB."""
        image = to_model_range(batch["image"])
        share = self.settings.prefix_share if self.training else 0.0
        rebuilt = self._vae.decode(decoded_latents(self._latents(image), share, batch["key"]))
        mse = F.mse_loss(rebuilt, image)
        return {
            "loss": mse + self.settings.gradient_weight * image_gradient_loss(rebuilt, image),
            "mse": mse.detach(),
            "psnr_db": psnr_db(rebuilt, image),
        }

    @torch.no_grad()
    def _latents(self, image: Tensor) -> list[Tensor]:
        """Return the latents of the tokens of the first 1, 2, ... scales."""
        return self._vae.quantize.tokenize(self._vae.encode(image).float())[1]

    def rebuilt(self, image: Tensor) -> Tensor:
        """Return the pictures decoded from all tokens."""
        return self._vae.decode(self._latents(image)[-1])
