"""Reads the rows of a CSV by one set of rules, whoever wrote the table and whatever it is for.

Quotes are taken at their word: one that is never closed is an error, for it would make one text of
all rows after it.
"""

import csv
from collections.abc import Iterable, Iterator

_LONGEST = 131_072  # characters of a cell: the csv module's own limit, unless a process changes it


class CsvError(ValueError):
    """A row that is no row of a CSV; the text says in which line, and why."""


def csv_rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line in which each row begins, and its cells; raises CsvError.

    `lines` keep their ends. Lines without anything in them are passed over.
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
    """Return in our words why a row that began in line `first` ends in an error in line `last`."""
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
    return f"no line of a CSV ({text})"
