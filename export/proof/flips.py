"""Compares sampled tokens: agreement, divergence, and whether rounding explains a flip.

A token is sampled by inverting the filtered cumulative distribution at a uniform number. Its margin
is that number's distance to the nearer edge of the token's interval in the reference. If the
measured error of the distribution is smaller than the margin, rounding cannot flip the token, so a
flip means a wrong computation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nsp.export.proof.recorded import Call
from nsp.layers.logits import filter_by_rank
from nsp.stage.backend import Backend

_HALF_ULP = 2.0**-24  # the stage sums V probabilities in float32: V roundings of at most this
_MAX_STORED_FLIPS = 16
# Further inputs that a drawing stage may have, and for each the value without effect.
_SETTINGS = (("temperature", 1, np.float32), ("top_p", 1, np.float32), ("top_k", 0, np.int64))


@dataclass(frozen=True)
class Flip:
    """One token that differs."""

    margin: float  # margin of the reference's token, in probability
    error: float  # largest difference of the two cumulative distributions, as float32 sums

    @property
    def is_benign(self) -> bool:
        """Whether rounding can explain it."""
        return self.margin <= self.error


@dataclass(frozen=True)
class TokenFigures:
    """Results of one part of the loop, over all batches."""

    num_tokens: int
    top1: int  # tokens whose most likely code agrees
    kl_sum: float
    flips: tuple[Flip, ...]

    @property
    def agreement(self) -> float:
        """Fraction of sampled tokens that agree."""
        return 1 - len(self.flips) / self.num_tokens

    def plus(self, other: "TokenFigures") -> "TokenFigures":
        """Return the combined results of both."""
        return TokenFigures(
            self.num_tokens + other.num_tokens,
            self.top1 + other.top1,
            self.kl_sum + other.kl_sum,
            self.flips + other.flips,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return {
            "tokens": self.num_tokens,
            "agreement": round(self.agreement, 6),
            "top1": round(self.top1 / self.num_tokens, 6),
            "kl_mean": float(f"{self.kl_sum / self.num_tokens:.4g}"),
            "flips": [
                {"margin": float(f"{f.margin:.4g}"), "error": float(f"{f.error:.4g}")}
                for f in self.flips[:_MAX_STORED_FLIPS]
            ],
        }


def redrawn(backend: Backend, select: Call, logits: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return what a recorded `select` call draws from other logits.

    `backend` is the reference, which samples from both logits with the same uniform numbers.
    """
    feeds: dict[str, Any] = {name: backend.upload(array) for name, array in select.feeds.items()}
    feeds["logits"] = backend.upload(logits)
    results = backend.run(select.stage, feeds)
    return {name: backend.download(results[name]) for name in ("tokens", "guided")}


def compare_tokens(select: Call, found: Mapping[str, NDArray[Any]]) -> TokenFigures:
    """Compare `tokens` and `guided` with those of the recorded call that drew tokens."""
    tokens, guided = found["tokens"], found["guided"]
    expected_tokens, expected = select.outputs["tokens"], select.outputs["guided"]
    old, new = _log_softmax(expected), _log_softmax(guided)
    return TokenFigures(
        num_tokens=tokens.size,
        top1=int((expected.argmax(-1) == guided.argmax(-1)).sum()),
        kl_sum=float((np.exp(old) * (old - new)).sum()),
        flips=tuple(_flips(select, expected, guided, expected_tokens != tokens)),
    )


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # infinite logits become NaN, which fails every gate
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _flips(
    select: Call, expected: NDArray[Any], guided: NDArray[Any], differs: NDArray[Any]
) -> list[Flip]:
    """Return the flips at the positions (B, L) where `differs`."""
    if not differs.any():
        return []
    images = np.nonzero(differs)[0]
    reference, found = (_cumulative(select, images, each[differs]) for each in (expected, guided))
    tokens = select.outputs["tokens"][differs][:, None]
    draws = select.feeds["uniforms"].astype(np.float64)[differs][:, None]
    upper = np.take_along_axis(reference, tokens, -1)
    before = np.take_along_axis(reference, np.maximum(tokens - 1, 0), -1)
    lower = np.where(tokens > 0, before, 0.0)
    margins = np.minimum(draws - lower, upper - draws)[:, 0]
    errors = np.abs(reference - found).max(-1) + reference.shape[-1] * _HALF_ULP
    return [Flip(float(m), float(e)) for m, e in zip(margins, errors, strict=True)]


def _cumulative(
    select: Call, images: NDArray[np.int64], guided: NDArray[Any]
) -> NDArray[np.float64]:
    """Return the cumulative distributions (M, V) for drawing M tokens, in float64.

    `images` gives the image whose settings each token has, `guided` the logits. All codes are
    ranked, which is right for the settings of every image.
    """
    batch = select.feeds["uniforms"].shape[0]
    temperature, top_p, top_k = (
        torch.from_numpy(select.feeds.get(name, np.full(batch, off, dtype))[images])
        for name, off, dtype in _SETTINGS
    )
    scaled = (torch.from_numpy(guided) / temperature[:, None])[:, None]
    filtered = filter_by_rank(scaled, top_p, top_k, torch.arange(guided.shape[-1]))
    cumulative = filtered[:, 0].double().softmax(-1).cumsum(-1)
    result: NDArray[np.float64] = (cumulative / cumulative[..., -1:]).numpy()
    return result
