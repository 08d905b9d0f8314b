"""Short reports about many files: each reason with its count and the first names."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from nsp.data.samples import Problem

MOST_NAMED = 10
_MOST_REASONS = 8
_NAMES_OF_EACH = 3
_MOST_LETTERS = 240  # letters of one name or reason


def by_reason(problems: Iterable[Problem]) -> list[tuple[str, list[str]]]:
    """Return every reason with the names it applies to, the most frequent first."""
    names: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        names[problem.reason].append(problem.name)
    return sorted(names.items(), key=lambda found: -len(found[1]))


def summary(problems: Iterable[Problem]) -> str:
    """Return the reasons with their counts and a few names: "400: the file is empty (a, b, ...)".

    For a reason that applies to one file, the name comes first: "a (the file is empty)".
    """
    reasons = by_reason(problems)
    shown = [_one_reason(reason, names) for reason, names in reasons[:_MOST_REASONS]]
    if rest := reasons[_MOST_REASONS:]:
        shown.append(f"{sum(len(names) for _, names in rest)} for {len(rest)} other reasons")
    return ", ".join(shown)


def first(names: Sequence[str], count: int = MOST_NAMED, total: int | None = None) -> str:
    """Return the first names, and how many more there are (of `total`, if given)."""
    rest = (len(names) if total is None else total) - min(count, len(names))
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(_short(name) for name in names[:count]) + more


def _one_reason(reason: str, names: list[str]) -> str:
    if len(names) == 1:
        return f"{_short(names[0])} ({_short(reason)})"
    return f"{len(names)}: {_short(reason)} ({first(names, _NAMES_OF_EACH)})"


def _short(text: str) -> str:
    half = _MOST_LETTERS // 2
    return text if len(text) <= _MOST_LETTERS else f"{text[:half]}…{text[-half:]}"
