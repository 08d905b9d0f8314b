"""How closely one contender computes what the baseline computes, step by step."""

from dataclasses import dataclass

import numpy as np

from nsp.config import Config


@dataclass(frozen=True, kw_only=True)
class StepParity(Config):
    """Errors of one part of the loop over all images.

    Of tokens and logits, where tokens are drawn: the baseline's tokens are fed to both, but for the
    last field. Where nothing can be fed, logits are compared until the tokens diverge.
    """

    name: str  # of the part, as tables of times call it
    latent_range: float | None = None  # of the baseline, largest minus smallest
    latent_max_abs_error: float | None = None  # of the latent after this part
    num_tokens: int | None = None  # over all images; None: no tokens are drawn
    logits_range: float | None = None
    max_abs_error: float | None = None
    mean_abs_error: float | None = None
    kl_mean: float | None = None  # KL(baseline || contender), unfiltered, in nats per token
    kl_max: float | None = None
    top1_agreement: float | None = None  # share of tokens whose most likely code is the same
    token_agreement: float | None = None  # share of sampled tokens that are the same
    free_token_agreement: float | None = None  # when both run free

    @property
    def max_relative_error(self) -> float:
        """Largest error of the logits over their range, or of the latent if none are drawn."""
        error, extent = self.max_abs_error, self.logits_range
        if error is None:
            error, extent = self.latent_max_abs_error, self.latent_range
        return error / extent if error and extent else 0.0


@dataclass(frozen=True, kw_only=True)
class Flip(Config):
    """A token both drew from the same random number, differently."""

    image: int
    step: int
    position: int
    expected: int
    drawn: int
    margin: float  # distance of the random number to the edge of the expected code's CDF interval
    cdf_error: float  # largest difference of the two CDFs at this token

    @property
    def explained(self) -> bool:
        """Whether the measured error is large enough to move the draw."""
        return self.margin <= self.cdf_error + 1e-6  # float32 rounding of the running sum


@dataclass(frozen=True, kw_only=True)
class Parity(Config):
    """Parity of a contender with the baseline."""

    baseline: str
    contender: str
    conditions: tuple[str, ...]  # prompts, or class ids in words
    seed: int
    steps: tuple[StepParity, ...]
    forced: bool = True  # whether both were fed the baseline's tokens
    num_flips: int  # of the fed ones
    flips: tuple[Flip, ...]  # the first hundred of them
    forced_psnr_db: float | None  # of the pictures from the same tokens; None: bit for bit equal
    free_psnr_db: float | None
    first_divergent_step: int | None  # when both run free; None: all tokens are the same

    @property
    def has_tokens(self) -> bool:
        """Whether tokens are drawn at all."""
        return any(step.num_tokens is not None for step in self.steps)

    @property
    def token_agreement(self) -> float | None:
        """Share of all sampled tokens that are the same, fed with the baseline's."""
        return self._mean("token_agreement")

    @property
    def free_token_agreement(self) -> float | None:
        """Share of all sampled tokens that are the same, free-running."""
        return self._mean("free_token_agreement")

    @property
    def max_relative_error(self) -> float:
        """Largest error of any logit, or value of a latent, over its range."""
        return max(step.max_relative_error for step in self.steps)

    def _mean(self, name: str) -> float | None:
        known = [(getattr(step, name), step.num_tokens) for step in self.steps]
        found = [(share, count) for share, count in known if share is not None]
        if not found:
            return None
        shares, counts = zip(*found, strict=True)
        return float(np.average(shares, weights=counts))
