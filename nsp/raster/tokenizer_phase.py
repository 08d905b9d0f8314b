"""The tokenizer phase of raster models: a VQGAN that reproduces pictures through its codes.

Axes: B batch, M latent cells of a step, V codes, Z width of a code vector. Reconstruction is L1
plus L1 of image gradients, without an adversary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import gather, reduce
from torch import Tensor, nn

from nsp.config import Config
from nsp.data.dataset import to_model_range
from nsp.family.objective import Batch, TrainingData
from nsp.raster.vq import VqTokenizer
from nsp.training.average import write_rows
from nsp.training.reconstruction import ReconstructionObjective, image_gradient_loss, psnr_db

_USED = 0.03  # a code is used if it is chosen at least this fraction of the average


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings(Config):
    """Settings of the tokenizer phase."""

    gradient_weight: float = 1.0  # of the L1 between image gradients: keeps edges sharp
    restart_every: int = 50  # steps between restarts of unused codes; 0: never
    restart_until: float = 0.9  # fraction of the phase after which codes are not moved


class TokenizerObjective(ReconstructionObjective):
    """Trains the tokenizer to reproduce pictures."""

    trained: VqTokenizer

    def __init__(self, vq: VqTokenizer, data: TrainingData, settings: TokenizerSettings) -> None:
        super().__init__(data)
        self.trained, self.settings = vq, settings
        self._restarts = True
        # From the current optimizer step, for `after_step`:
        self._latents: list[Tensor] = []  # (M, Z) each
        self._hits_V: Tensor | None = None

    def units(self) -> Sequence[nn.Module]:
        """Return the levels of encoder and decoder."""
        return [*self.trained.encoder.down, *self.trained.decoder.up]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, its parts and PSNR in dB."""
        vq, image = self.trained, to_model_range(batch["image"])
        latent_BZhw = vq.encode(image)
        quantized = vq.quantize(latent_BZhw)
        rebuilt = vq.decode(quantized.latent)
        pixel = F.l1_loss(rebuilt, image)
        gradient = image_gradient_loss(rebuilt, image)
        codes = quantized.codebook_loss
        codes = codes + vq.config.commitment_weight * quantized.commitment_loss
        if self.training:
            hits_V = quantized.codes.flatten().bincount(minlength=vq.config.codebook_size).float()
            self._hits_V = hits_V if self._hits_V is None else self._hits_V + hits_V
            self._latents.append(latent_BZhw.detach().float().movedim(1, -1).flatten(0, 2))
        return {
            "loss": pixel + self.settings.gradient_weight * gradient + codes,
            "recon_loss": pixel.detach(),
            "vq": codes.detach(),
            "psnr_db": psnr_db(rebuilt, image),
        }

    def before_step(self, step: int, steps: int) -> bool:
        """Decide whether unused codes may still move: the decoder must still learn moved codes."""
        self._restarts = step < self.settings.restart_until * steps
        return True

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float | Tensor]:
        """Update the usage of codes, and move unused ones onto latents of this step.

        Reports the share of codes in use in % and their perplexity, exp of the entropy. The step's
        latents are gathered in the order of its samples, so that all processes choose the same.
        """
        latents, self._latents = torch.cat(self._latents), []
        hits_V, self._hits_V = self._hits_V, None
        assert hits_V is not None
        usage_V = self.trained.quantize.usage_V
        usage_V.lerp_(reduce(hits_V, "sum"), 0.1 if bool(usage_V.any()) else 1.0)
        shares = usage_V / usage_V.sum()
        used = usage_V > _USED * usage_V.mean()
        report: dict[str, float | Tensor] = {
            "codebook_usage": used.float().mean() * 100,
            "perplexity": torch.special.entr(shares).sum().exp(),
        }
        every = self.settings.restart_every
        if every and self._restarts and (step + 1) % every == 0:
            report["codes_restarted"] = float(self._restart(~used, gather(latents), step))
        return report

    def _restart(self, unused_V: Tensor, latents_MZ: Tensor, step: int) -> int:
        """Move unused codes onto random latents; return how many moved."""
        codebook, unused = self.trained.quantize, unused_V.nonzero().flatten()
        # Drawn on the CPU from the step alone: the same on every process and device.
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(len(latents_MZ), (len(unused),), generator=generator)
        write_rows(codebook.embedding.weight, unused, latents_MZ[picks.to(unused.device)])
        codebook.usage_V[unused] = codebook.usage_V.mean()
        return len(unused)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return False for biases, norms and the codebook."""
        return parameter.ndim > 1 and "embedding" not in name

    def rebuilt(self, image: Tensor) -> Tensor:
        """Return the pictures decoded from their codes."""
        return self.trained.rebuilt(image)
