"""The samples that no training run may see: a list of names and captions that travels with them.

A folder or tar carries it as `__heldout__` at its top: a header line, then one `name<TAB>caption`
a line. It holds out those samples, and all others with one of those captions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from nsp.errors import DataError

HELDOUT_MEMBER = "__heldout__"  # webdataset readers pass over names of this form


def parse_heldout(text: str, *, where: str) -> list[tuple[str, str]]:
    """Return (name, caption) of each held-out sample; `where` names the list in errors."""
    rows = [tuple(line.split("\t")) for line in text.splitlines()[1:]]
    for number, row in enumerate(rows, start=2):
        if len(row) != 2 or not all(row):
            raise DataError(f"{where}, line {number}: expected name<TAB>caption, got {row}")
    return [(row[0], row[1]) for row in rows]


def format_heldout(rows: Iterable[tuple[str, str]]) -> str:
    """Return the text that `parse_heldout` reads."""
    return "name\tcaption\n" + "".join(f"{name}\t{caption}\n" for name, caption in rows)


@dataclass(frozen=True)
class Heldout:
    """Which samples are held out; a caption counts whatever its case and spacing."""

    rows: frozenset[tuple[str, str]]
    names: frozenset[str]
    captions: frozenset[str]

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str]]) -> Self:
        """Return the list of these rows."""
        kept = frozenset(rows)
        return cls(
            rows=kept,
            names=frozenset(name for name, _ in kept),
            captions=frozenset(fold_caption(caption) for _, caption in kept),
        )

    def covers(self, name: str, caption: str) -> bool:
        """Return whether a sample is held out."""
        return name in self.names or fold_caption(caption) in self.captions


def fold_caption(caption: str) -> str:
    """Return what two captions share that differ in case and spacing only."""
    return " ".join(caption.casefold().split())
