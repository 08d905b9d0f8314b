"""One table of a report, and how its cells are written."""

from dataclasses import dataclass

NONE = "-"


@dataclass(frozen=True)
class Section:
    """A table with its title and what must be said beside it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    numbers: bool = True  # all columns but the first are aligned to the right
    topic: str = ""  # chapter of the page it belongs to


def ms(value: float) -> str:
    """Return milliseconds, or a rate, with about three digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def percent(share: float) -> str:
    """Return a share; 100 % only when it is all."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.2f} %"


def db(value: float | None) -> str:
    """Return a PSNR; None is that of equal pictures."""
    return "identical" if value is None else f"{value:.1f} dB"
