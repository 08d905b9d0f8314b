"""The limits of every precision, and whether an output of a stage is within them; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.family.gate import Gate, Psnr, Tokens

_HIGHEST_PSNR = 200.0  # stands for equal pictures


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one precision."""

    relative_error: float  # max abs error of an output / its range, except logits and images
    logits_error: float  # the same for logits
    token_agreement: float  # fraction of sampled tokens, per unit of the loop
    psnr_db: float  # least PSNR of decoded images

    def allowed_flips(self, num_tokens: int) -> int:
        """Return how many of the tokens may differ: the allowed fraction, and a margin for chance.

        It is chance whether a draw is close to an edge, and with few tokens chance matters more:
        three standard deviations of that many draws are allowed in addition.
        """
        share = 1 - self.token_agreement
        spread = (num_tokens * share * self.token_agreement) ** 0.5
        return int(num_tokens * share + 3 * spread + 1) if share else 0

    def allowed(self, gate: Gate, name: str, expected: NDArray[Any]) -> float:
        """Return the largest absolute error that an output may have anywhere.

        For a picture the PSNR decides, so a single pixel may have any finite error; this then
        returns the error at which the PSNR is at its limit if all pixels have it.
        """
        if np.issubdtype(expected.dtype, np.integer):
            return 0.0
        if gate == Psnr(name):
            return float(10 ** (-self.psnr_db / 20))
        is_logits = isinstance(gate, Tokens) and gate.logits == name
        limit = self.logits_error if is_logits else self.relative_error
        return limit * float(np.ptp(expected)) if expected.size else 0.0


LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(relative_error=1e-4, logits_error=1e-4, token_agreement=1.0, psnr_db=80),
    # In half precision tokens and images are the gates; limits of errors follow from rounding.
    "fp16": Limits(relative_error=1e-2, logits_error=2e-2, token_agreement=0.99, psnr_db=45),
    # 8 bits of mantissa instead of 11: errors are eight times as large.
    "bf16": Limits(relative_error=8e-2, logits_error=0.16, token_agreement=0.92, psnr_db=27),
    # Opt-in. Measured with a small trained model: 2.4 % of the range, 86 % of the worst scale.
    "int8": Limits(relative_error=5e-2, logits_error=5e-2, token_agreement=0.8, psnr_db=80),
}


@dataclass(frozen=True)
class Difference:
    """The difference of an output from the expected one; NaN counts as infinitely wrong."""

    max_abs: float
    mean_abs: float
    range: float  # largest minus smallest expected value
    is_integer: bool

    @property
    def relative(self) -> float:
        """The largest difference over the range."""
        if self.range:
            return self.max_abs / self.range
        return 0.0 if self.max_abs == 0 else float("inf")


def difference(expected: NDArray[Any], found: NDArray[Any]) -> Difference:
    """Return how `found` differs from `expected`."""
    is_integer = np.issubdtype(expected.dtype, np.integer)
    if not expected.size:
        return Difference(0.0, 0.0, 0.0, is_integer)
    wide = expected.astype(np.float64)
    apart = np.abs(wide - found.astype(np.float64))
    worst = float(apart.max())
    worst = worst if np.isfinite(worst) else float("inf")
    return Difference(worst, float(apart.mean()), float(np.ptp(wide)), is_integer)


def relative_error(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Return the largest difference divided by the range of the expected output."""
    return difference(expected, found).relative


def problem(
    limits: Limits, gate: Gate, name: str, expected: NDArray[Any], found: NDArray[Any]
) -> str | None:
    """Return in words how an output fails its gate; None if it passes."""
    apart = difference(expected, found)
    if isinstance(gate, Tokens) and gate.decides(name):
        return None if np.isfinite(apart.max_abs) else "it is not finite"
    if apart.is_integer:
        agreement = float(np.mean(expected == found)) if expected.size else 1.0
        if agreement < 1:
            return f"{agreement:.2%} of the integers agree; limit 100 %"
        return None
    if gate == Psnr(name):
        psnr = psnr_db(expected, found)
        return None if psnr >= limits.psnr_db else f"PSNR {psnr:.1f} dB; limit {limits.psnr_db} dB"
    if apart.max_abs <= limits.allowed(gate, name, expected):
        return None
    limit = limits.allowed(gate, name, np.array([0.0, 1.0]))
    return f"max abs error is {apart.relative:.2e} of the range; limit {limit}"


def psnr_db(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the peak signal-to-noise ratio of images in [0, 1], in dB, at most 200."""
    error = float(np.mean((reference.astype(np.float64) - other.astype(np.float64)) ** 2))
    if not np.isfinite(error):
        return 0.0
    if error == 0:
        return _HIGHEST_PSNR
    return min(_HIGHEST_PSNR, -10 * float(np.log10(error)))
