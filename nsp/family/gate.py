"""The conditions for an exported stage to count as correct, declared with it; without torch."""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Range:
    """Every number is right up to a fraction of its output's range."""


@dataclass(frozen=True)
class Psnr:
    """One output is a picture in [0, 1]; its peak signal-to-noise ratio is checked."""

    picture: str


@dataclass(frozen=True)
class Tokens:
    """One output has logits; the tokens that the next stage draws from them are checked.

    That stage, one of `drawn_by`, takes `logits` (G, L, V) and `uniforms` (B, L) in [0, 1) and
    returns `tokens` (B, L), drawn by inverting the cumulative distribution, and `guided` (B, L, V),
    the logits after guidance. It may also take `temperature`, `top_p` and `top_k` (B,).
    """

    logits: str
    drawn_by: tuple[str, ...]


Gate: TypeAlias = Range | Psnr | Tokens
RANGE = Range()
