"""How much noise a picture has at every timestep, and what a model predicts of it.

A noisy latent is x_t = sqrt(A_t)·x_0 + sqrt(1 - A_t)·ε, where A_t, the product of 1 - β up to t,
falls from almost 1 to almost 0. Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic
Models", equation 4; the names of the schedules are those of diffusers, "cosine" being its
`squaredcos_cap_v2` (Nichol and Dhariwal, "Improved DDPM", equation 17).
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nsp.config import Config
from nsp.errors import ConfigError

Betas: TypeAlias = Literal["linear", "scaled_linear", "cosine"]
Prediction: TypeAlias = Literal["epsilon", "v_prediction", "sample"]
Spacing: TypeAlias = Literal["leading", "trailing", "linspace"]

_MOST_TIMESTEPS = 100_000
_COSINE_OFFSET = 0.008


@dataclass(frozen=True, kw_only=True)
class Noise(Config):
    """The noise that a model was trained with; part of its configuration."""

    betas: Betas = "scaled_linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_timesteps: int = 1000  # T; the timesteps are 0 to T - 1
    # The last timestep is pure noise (Lin et al., "Common Diffusion Noise Schedules and Sample
    # Steps are Flawed", algorithm 1). A predicted ε says nothing about the picture there.
    zero_terminal_snr: bool = False
    smallest_beta: float = 0.0  # bounds of "cosine"
    largest_beta: float = 0.999
    prediction: Prediction = "epsilon"
    spacing: Spacing = "leading"  # which timesteps a few steps of sampling visit
    steps_offset: int = 0  # added to those of spacing "leading"
    ends_at_first: bool = False  # DDIM's last step ends at A_0, and not at 1
    clip: float | None = None  # DDPM and DDIM bound the predicted x_0 by it
    # Sampling begins with noise of variance 1 - A_t of the first timestep, and not with 1.
    scaled_start: bool = False

    def __post_init__(self) -> None:
        """Check the ranges, and that the prediction says something at every timestep."""
        self.check_counts("noise", "num_timesteps", most=_MOST_TIMESTEPS)
        self.check_counts("noise", "steps_offset", least=0, most=self.num_timesteps - 1)
        self.check_reals("noise", "beta_start", "beta_end", least=1e-12, most=0.999)
        self.check_reals("noise", "smallest_beta", "largest_beta", least=0, most=0.9999)
        if self.clip is not None:
            self.check_reals("noise", "clip", least=1e-6, most=1e6)
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ConfigError(
                "noise: with zero_terminal_snr the last timestep is pure noise, which a predicted "
                "epsilon cannot take away; use prediction v_prediction or sample"
            )

    def beta_values(self) -> NDArray[np.float64]:
        """Return β of every timestep (T,)."""
        total = self.num_timesteps
        match self.betas:
            case "linear":
                betas = np.linspace(self.beta_start, self.beta_end, total)
            case "scaled_linear":
                betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, total) ** 2
            case "cosine":
                angle = (np.arange(total + 1) / total + _COSINE_OFFSET) / (1 + _COSINE_OFFSET)
                left = np.cos(angle * math.pi / 2) ** 2
                betas = np.clip(1 - left[1:] / left[:-1], self.smallest_beta, self.largest_beta)
        return np.asarray(_zero_terminal(betas) if self.zero_terminal_snr else betas, np.float64)

    def kept(self) -> NDArray[np.float64]:
        """Return A of every timestep (T,): the share of the picture in the variance."""
        return np.asarray(np.cumprod(1 - self.beta_values()), np.float64)


def _zero_terminal(betas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return β shifted and scaled so that sqrt(A) ends at 0 and begins as before."""
    root = np.sqrt(np.cumprod(1 - betas))
    kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return np.asarray(1 - kept / np.concatenate([[1.0], kept[:-1]]), np.float64)
