"""How codes are drawn from logits: the settings that all families of codes share, and the numbers.

The stages that draw are built from `nsp.layers.logits`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nsp.errors import ConfigError
from nsp.family.order import Order, Sampling, stream
from nsp.stage.backend import TENSORRT_RANKS

# Bounds far beyond any use. Beyond them float32 overflows and gives noise without an error.
LARGE = 1e6


@dataclass(frozen=True, kw_only=True)
class CodeSampling(Sampling):
    """Settings of one image whose codes are drawn from logits."""

    top_k: int = field(
        default=0, metadata={"help": "Draw from the K most likely codes; 0 is off, 1 is greedy."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Draw from the most likely codes of mass P; 1 is off."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits; lower is less random."}
    )

    @property
    def sorted_codes(self) -> int:
        """How many of the largest logits must be sorted whichever stage draws; 0 for none."""
        return self.top_k

    @property
    def greedy(self) -> str | None:
        """The setting that gives every seed the same image, in words; None if seeds matter."""
        return "top_k=1" if self.top_k == 1 else None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must be at least 0; 0 is off")
        if not 1 / LARGE <= self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be in [{1 / LARGE:g}, 1]; 1.0 is off")
        if not 1 / LARGE <= self.temperature <= LARGE:
            raise ConfigError(
                f"temperature={self.temperature} must be in [{1 / LARGE:g}, {LARGE:g}]; "
                "top_k=1 is greedy"
            )

    @property
    def is_nucleus_alone(self) -> bool:
        """Whether top-p decides among all codes, because no top-k limits their number."""
        return self.top_p < 1 and not self.top_k

    def num_ranks(self, vocab_size: int) -> int:
        """Return how many of the largest logits a stage sorts for these settings."""
        return vocab_size if self.is_nucleus_alone else rank_bucket(self.top_k, vocab_size)


def rank_bucket(top_k: int, vocab_size: int) -> int:
    """Return how many logits are sorted for a top-k, rounded up so that recordings stay few.

    It is a power of two, or the most that TensorRT can sort, or all.
    """
    power: int = 1 << max(top_k - 1, 0).bit_length()
    if power > TENSORRT_RANKS >= top_k:
        power = TENSORRT_RANKS
    return min(power, vocab_size)


def draw_inputs(
    orders: Sequence[Order[CodeSampling]], vocab_size: int
) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """Return every image's temperature, top-p and top-k (B,), and the ranks (R,) to sort.

    If top-p without top-k needs all codes as ranks, `top_k_ranks` are the ranks for a stage that
    needs only those of top-k.
    """
    settings = [order.sampling for order in orders]
    top_k = [min(each.top_k, vocab_size) for each in settings]
    ranks = {"ranks": settings[0].num_ranks(vocab_size)}
    if any(each.is_nucleus_alone for each in settings):
        ranks["top_k_ranks"] = rank_bucket(max(top_k), vocab_size)
    return {
        "temperature": np.array([each.temperature for each in settings], np.float32),
        "top_p": np.array([each.top_p for each in settings], np.float32),
        "top_k": np.array(top_k, np.int64),
        **{name: np.arange(count, dtype=np.int64) for name, count in ranks.items()},
    }


def draw_uniforms(seed: int, num_tokens: int) -> NDArray[np.float32]:
    """Return the uniform numbers (L,) in [0, 1) of one image."""
    return stream(seed).random(num_tokens, np.float32)
