"""The tokenizer phase of the family `var`: a VQVAE that reproduces pictures through its token maps.

Axes: B batch, N latent cells of a step, S scales, V codes, Z latent channels. The published
tokenizer recipe is not public beyond its VQ loss (arXiv:2404.02905, algorithms 1 and 2):
reconstruction here is L1 plus L1 of image gradients, without an adversary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import gather, reduce
from torch import Tensor, nn

from nsp.config import Config
from nsp.data.dataset import to_model_range
from nsp.errors import ConfigError
from nsp.families.var.system import VarSystem
from nsp.families.var.vqvae import VQVAE
from nsp.family.objective import Batch, TrainingData
from nsp.training.average import write_rows
from nsp.training.data_order import sample_uniforms
from nsp.training.reconstruction import ReconstructionObjective, image_gradient_loss, psnr_db


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings(Config):
    """Settings of the tokenizer phase."""

    gradient_weight: float = 1.0  # of the L1 between image gradients: keeps edges sharp
    vq_weight: float = 1.0
    restart_every: int = 50  # steps between restarts of unused codes; 0: never
    restart_until: float = 0.9  # fraction of the phase after which codes are not moved
    restart_share: float = 0.03  # a code used less than this fraction of the average is unused
    # Fraction of pictures decoded from only the first scales, a random number of at least half of
    # them (quantizer dropout: Zeghidour et al. 2021, arXiv:2107.03312): the first tokens then
    # describe as much of a picture as they can, and a decoder can use them alone.
    prefix_share: float = 0.0

    def __post_init__(self) -> None:
        """Check the share."""
        check_prefix_share(self.prefix_share)


def check_prefix_share(share: float) -> None:
    """Raise ConfigError for a share that leaves no whole pictures."""
    if not 0 <= share < 1:
        raise ConfigError(f"prefix_share must be in [0, 1), got {share}")


class TokenizerObjective(ReconstructionObjective):
    """Trains the VQVAE to reproduce pictures through its token maps."""

    trained: VQVAE

    def __init__(
        self,
        system: VarSystem,
        data: TrainingData,
        settings: TokenizerSettings,
    ) -> None:
        super().__init__(data)
        self.trained, self.settings = system.vae, settings
        self._restarts = True
        # From the current optimizer step, for `after_step`:
        self._latents: list[Tensor] = []  # (N, Z) each
        self._hits_SV: Tensor | None = None

    def units(self) -> Sequence[nn.Module]:
        """Return the levels of encoder and decoder."""
        return [*self.trained.encoder.down, *self.trained.decoder.up]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, its parts, PSNR in dB and the number of codes in use."""
        vae = self.trained
        image = to_model_range(batch["image"])
        latent_BZhw = vae.encode(image)
        quantized = vae.quantize(latent_BZhw)
        share = self.settings.prefix_share if self.training else 0.0
        rebuilt = vae.decode(decoded_latents(quantized.latents, share, batch["key"]))
        pixel = F.l1_loss(rebuilt, image)
        gradient = image_gradient_loss(rebuilt, image)
        loss = pixel + self.settings.gradient_weight * gradient
        if self.training:
            self._count(quantized.tokens)
            self._latents.append(latent_BZhw.detach().float().movedim(1, -1).flatten(0, 2))
        return {
            "loss": loss + self.settings.vq_weight * quantized.loss,
            "l1": pixel.detach(),
            "vq": quantized.loss.detach(),
            "psnr_db": psnr_db(rebuilt, image),
        }

    def before_step(self, step: int, steps: int) -> bool:
        """Decide whether unused codes may still move: the decoder must still learn moved codes."""
        self._restarts = step < self.settings.restart_until * steps
        return True

    def _count(self, tokens: Sequence[Tensor]) -> None:
        """Add up how often each code was chosen at each scale."""
        codes = self.trained.config.vocab_size
        hits = [index.flatten().bincount(minlength=codes).float() for index in tokens]
        total = torch.stack(hits)
        self._hits_SV = total if self._hits_SV is None else self._hits_SV + total

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float | Tensor]:
        """Update the usage of codes, and move unused ones onto latents of this step.

        The moving average of the usage is that of the published models/quant.py. The step's latents
        are gathered in the order of its samples, so that all processes choose the same ones.
        """
        latents, self._latents = torch.cat(self._latents), []
        hits_SV, self._hits_SV = self._hits_SV, None
        assert hits_SV is not None
        table_SV = self.trained.quantize.ema_vocab_hit_SV
        started = table_SV.any(1, keepdim=True)
        table_SV.lerp_(reduce(hits_SV, "sum"), torch.where(started, 0.1, 1.0))
        used = table_SV > 0.03 * table_SV.mean(1, keepdim=True)
        sides = self.trained.quantize.patch_nums
        report: dict[str, float | Tensor] = {"codes_used": used.any(0).sum()}
        report |= {f"codes_used_{s}x{s}": n for s, n in zip(sides, used.sum(1), strict=True)}
        every = self.settings.restart_every
        if every and self._restarts and (step + 1) % every == 0:
            report["codes_restarted"] = float(self._restart_codes(gather(latents), step))
        return report

    def _restart_codes(self, latents_NZ: Tensor, step: int) -> int:
        """Move unused codes onto random latents; return how many moved."""
        quantize = self.trained.quantize
        usage_V = quantize.ema_vocab_hit_SV.sum(0)
        unused = (usage_V < self.settings.restart_share * usage_V.mean()).nonzero().flatten()
        # Drawn on the CPU from the step alone: the same on every process and device.
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(len(latents_NZ), (len(unused),), generator=generator)
        # Residuals of late scales are small; a random size covers every scale.
        size = torch.rand(len(unused), 1, generator=generator).to(unused.device)
        new_rows = latents_NZ[picks.to(unused.device)] * size
        write_rows(quantize.embedding.weight, unused, new_rows)
        average = usage_V.mean() / len(quantize.ema_vocab_hit_SV)
        quantize.ema_vocab_hit_SV[:, unused] = average
        return len(unused)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return False for biases, norms and the codebook."""
        return parameter.ndim > 1 and "embedding" not in name

    def rebuilt(self, image: Tensor) -> Tensor:
        """Return the pictures decoded from all tokens."""
        return self.trained.decode(self.trained.quantize(self.trained.encode(image)).latents[-1])


def decoded_latents(latents: Sequence[Tensor], share: float, key_B: Tensor) -> Tensor:
    """Return the latent (B, C, h, w) to decode for each picture.

    `latents` are those of the first 1, 2, ... scales. A fraction of the pictures, chosen by their
    keys, is decoded from only the first scales.
    """
    if share == 0:
        return latents[-1]
    fewest, most = len(latents) // 2, len(latents) - 1  # scales kept if some are left out
    dropped, place = sample_uniforms(key_B, 2).unbind(1)
    kept = (fewest + place * (most - fewest + 1)).long().clamp(1, most)
    last = torch.where(dropped < share, kept - 1, len(latents) - 1).to(latents[0].device)
    return torch.stack(list(latents))[last, torch.arange(len(last), device=last.device)]
