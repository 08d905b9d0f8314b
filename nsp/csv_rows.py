"""Reads the rows of every CSV table by the same rules.

A quote that is never closed is an error, because it would join all rows after it into one text.
"""

import csv
from collections.abc import Iterable, Iterator

_LONGEST = 131_072  # characters of a cell: the csv module's own limit, unless a process changes it


class CsvError(ValueError):
    """A row that is not valid CSV; the text says in which line, and why."""


def csv_rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line in which each row begins, and its cells; raises CsvError.

    `lines` keep their line ends. Empty lines are skipped.
    """
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        number = table.line_num + 1
        try:
            cells = next(table, None)
        except csv.Error as error:
            raise CsvError(f"line {number}: {_reason(error, number, table.line_num)}") from error
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield number, cells


def _reason(error: csv.Error, first: int, last: int) -> str:
    """Return why a row that began in line `first` failed in line `last`."""
    text = str(error)
    if "unexpected end of data" in text:
        return 'a quote (") that opens in this row is never closed'
    if "field limit" in text:
        opened = '; a quote (") that opens in this row may not be closed' if last > first else ""
        return f"a text of more than {_LONGEST:,} characters{opened}"
    if "expected after" in text:
        until = f", in line {last}" if last > first else ""
        return (
            f'a text follows a closing quote{until}; write "" for a quote inside a text, '
            "and close a text with one"
        )
    return f"not a line of a CSV ({text})"
