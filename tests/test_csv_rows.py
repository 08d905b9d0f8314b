"""A table is read by one set of rules: no quote swallows rows, and errors are in our words."""

from pathlib import Path

import pytest

from nsp.console.prompt_lists import read_list
from nsp.csv_rows import CsvError, csv_rows
from nsp.data.sources import open_source
from nsp.errors import ConfigError, DataError
from tests.data.picture_files import encoded, write_files

UNCLOSED = 'a.png,"unclosed\nb.png,green\n'
HALF_CLOSED = 'a.png,"unclosed\nb.png,"green"\n'


def _rows(text: str) -> list[tuple[int, list[str]]]:
    return list(csv_rows(text.splitlines(keepends=True), ","))


def test_a_row_is_told_by_the_line_in_which_it_begins() -> None:
    rows = _rows('a,b\n\n1,"two\nlines"\n , \n3,"say ""hi"""\n')
    assert rows == [(1, ["a", "b"]), (3, ["1", "two\nlines"]), (6, ["3", 'say "hi"'])]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (UNCLOSED, "line 2: a quote .* is never closed"),
        (HALF_CLOSED, "line 2: a text follows a closing quote, in line 3; write"),
        ('a.png,"red" cat\n', 'line 2: a text follows a closing quote; write ""'),
        ("a.png," + "x" * 200_000, "line 2: a text of more than 131,072 characters$"),
        ('a.png,"' + "x,y\n" * 50_000, "line 2: a text of more than .* may not be closed"),
    ],
)
def test_what_is_no_row_is_told_with_its_line(rows: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CsvError, match=reason):
        _rows(f"file_name,text\n{rows}")
    pictures = {"a.png": encoded(".png"), "b.png": encoded(".png", 1)}
    for name in ("metadata.csv", "c/list.csv", "captions.txt"):
        table = {name: f"file_name,text\n{rows}"}
        with pytest.raises(DataError, match=f"{name} cannot be read: {reason}"):
            open_source(write_files(tmp_path / name.replace("/", "-"), {**pictures, **table}))
    (tmp_path / "list.csv").write_text("seed,text\n" + rows.replace(".png", ""))
    with pytest.raises(ConfigError, match=f"list.csv, {reason}"):
        read_list(tmp_path / "list.csv")


def test_a_column_without_a_name_is_no_field_too_many(tmp_path: Path) -> None:
    """As pandas writes the numbers of rows."""
    table = ",file_name,text\n0,a.png,red\n1,b.png,green\n"
    files = {"metadata.csv": table, "a.png": encoded(".png"), "b.png": encoded(".png", 1)}
    source = open_source(write_files(tmp_path, files))
    assert [sample.caption for sample in source.samples] == ["red", "green"]
