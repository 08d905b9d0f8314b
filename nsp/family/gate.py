"""What it takes for an exported stage to count as correct, declared with the stage. No torch."""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Range:
    """Every number is right to a share of the range of its output."""


@dataclass(frozen=True)
class Psnr:
    """One output is a picture in [0, 1], judged by its peak signal-to-noise ratio."""

    picture: str


@dataclass(frozen=True)
class Tokens:
    """One output holds logits, judged by the tokens that the next stage draws from them.

    That stage, one of `drawn_by`, takes `logits` (G, L, V) and `uniforms` (B, L) in [0, 1) and
    returns `tokens` (B, L), drawn by inverting the cumulative distribution, and `guided` (B, L, V),
    the logits after guidance. Of `temperature`, `top_p` and `top_k` (B,) it takes what it has.
    """

    logits: str
    drawn_by: tuple[str, ...]


Gate: TypeAlias = Range | Psnr | Tokens
RANGE = Range()
