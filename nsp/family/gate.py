"""The conditions for an exported stage to count as correct, declared with it; without torch."""

from dataclasses import dataclass
from typing import TypeAlias

from nsp.stage.arena import is_cached


@dataclass(frozen=True)
class Range:
    """Every number is right up to a fraction of its output's range."""


@dataclass(frozen=True)
class Psnr:
    """One output is a picture in [0, 1]; its peak signal-to-noise ratio is checked."""

    picture: str


@dataclass(frozen=True)
class Tokens:
    """One output has logits; the tokens that are drawn from them are checked.

    The next stage, one of `drawn_by`, takes `logits` (G, L, V) and `uniforms` (B, L) in [0, 1) and
    returns `tokens` (B, L), drawn by inverting the cumulative distribution, and `guided` (B, L, V),
    the logits after guidance. It may also take `temperature`, `top_p` and `top_k` (B,). Without
    `drawn_by` the stage itself draws, with these inputs and outputs: they, and whatever follows
    from the tokens, are then checked by the tokens alone.
    """

    logits: str
    drawn_by: tuple[str, ...] = ()

    def decides(self, output: str) -> bool:
        """Return whether an output is checked by the tokens alone."""
        return not self.drawn_by and output != self.logits and not is_cached(output)


Gate: TypeAlias = Range | Psnr | Tokens
RANGE = Range()
