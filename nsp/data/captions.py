"""Reads captions in the usual forms: tables that name pictures, and files next to a picture.

A table has rows with the name of a picture (under one of FILE_KEYS) and its caption or captions
(under the first of CAPTION_KEYS that the row has). It is one of

    *.jsonl         one object per line; also a JSON array or object in a file of that name
    *.json          an array of such objects; {name: caption or object}; COCO's images/annotations
    *.csv, *.tsv    with a header line; also *caption*.txt (separated by comma, semicolon, tab or |)
    *.parquet       with columns of these names (needs pyarrow)

Next to a picture there may be `.txt` (the caption), `.caption` (the same) or `.json` (an object, as
img2dataset writes it). `nsp data pack` writes several captions as `captions` in a `.json`, and the
first of them also as `.txt`, so that readers that know only `.txt` see one caption per picture.
"""

import io
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from nsp.csv_rows import csv_rows
from nsp.data.bounds import check_size, read_regular
from nsp.data.samples import CAPTION_SUFFIX, CAPTIONS_SUFFIX, JSON_SUFFIX, parse_caption, shown
from nsp.errors import DataError, MissingExtraError
from nsp.files import open_regular, parse_json

FILE_KEYS = ("file_name", "filename", "file", "image", "path", "image_path", "image_name")
CAPTION_KEYS = ("text", "caption", "captions", "prompt")
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
MAX_TABLE_BYTES = 512 << 20
MAX_JSON_BYTES = 128 << 20  # of one value, which needs up to 20 times the memory; COCO has 92 MB
_MAX_LINE_BYTES = 4 << 20
_HEAD_BYTES = 2 * _MAX_LINE_BYTES
_HEADER_BYTES = 4096
_MAX_BAD_ROWS = 100_000
_SHOWN_KEYS = 8


@dataclass(frozen=True, slots=True)
class Row:
    """The row of a table about one picture."""

    file_name: str
    captions: tuple[str, ...]


@dataclass
class Table:
    """The rows of a table; `bad` has name and reason of rows without a name or a caption."""

    name: str  # the name of its file in the folder
    rows: list[Row] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    is_sure: bool = False  # whether it is surely a table of pictures
    is_guess: bool = False  # whether it maps names to texts, which may not be captions

    def refuse(self, name: str, reason: str) -> None:
        """Record a bad row; DataError if so many are bad that it cannot be a table of captions."""
        self.bad.append((name, reason))
        if len(self.bad) > _MAX_BAD_ROWS:
            raise DataError(
                f"{shown(self.name)}: more than {_MAX_BAD_ROWS:,} rows cannot be used, the last: "
                f"{reason}; repair or remove the file"
            )

    def take(self, values: Any, number: int) -> None:
        """Add row `number`, or record why it cannot be used."""
        where = f"{posixpath.basename(self.name)}:{number}"
        file = _first_text(values, FILE_KEYS) if isinstance(values, dict) else None
        if file is None:
            keys = f" (it has {_keys(values)})" if isinstance(values, dict) else ""
            self.refuse(where, f"the row has no file_name{keys}")
            return
        try:
            self.rows.append(Row(file, captions_of(values)))
        except DataError as error:
            self.refuse(file, f"no text in {shown(self.name)}: {error}")


def captions_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the captions of a row; DataError with only the reason if it has none."""
    lower = {str(key).strip().lower(): value for key, value in values.items()}
    for key in CAPTION_KEYS:
        found = lower.get(key)
        if isinstance(found, str):
            return (found,)
        if isinstance(found, list) and found and all(isinstance(each, str) for each in found):
            return tuple(found)
        if found is not None and found != []:
            raise DataError(f"its {key} is neither a text nor a list of texts")
    if lower.keys() & set(CAPTION_KEYS):
        raise DataError("its caption is empty")
    raise DataError(f"the row has {_keys(values)}; captions are read from {_or(CAPTION_KEYS)}")


def read_table(root: Path, name: str) -> Table | None:
    """Return the table in a file, or None if the file is not a table; DataError if it is damaged.

    Every file called metadata.jsonl or with "caption" in its name counts as a table.
    """
    base, suffix = posixpath.basename(name).lower(), posixpath.splitext(name)[1].lower()
    table, where = Table(name), root / name
    is_named = base.startswith("metadata.") or "caption" in base
    try:
        found = _READERS[suffix](root / name, table)
    except (OSError, ValueError, DataError) as error:
        if not is_named and not table.is_sure:
            return None
        reason = error.strerror if isinstance(error, OSError) else _reason(error)
        raise DataError(f"{where} cannot be read: {reason}") from error
    if found is None and "caption" in base:
        raise DataError(
            f"{where} seems to contain captions, but not in a known form; give each row "
            f"the name of a picture ({FILE_KEYS[0]}) and its caption ({_or(CAPTION_KEYS)}), as "
            "in metadata.jsonl, or remove the file"
        )
    return found


def captions_beside(
    readers: Mapping[str, Callable[[], bytes]],
) -> tuple[Sequence[bytes | str], bool]:
    """Return the captions in the files next to a picture, and whether these differ.

    `readers` read the files, by suffix. If the files differ, `.txt` is used, otherwise `.caption`.
    The result may have no captions. Raises DataError with only the reason when the file to be used
    cannot be read; the other files are then not needed.
    """
    found: dict[str, bytes] = {}
    for suffix in (CAPTION_SUFFIX, CAPTIONS_SUFFIX, JSON_SUFFIX):
        if suffix in readers:
            try:
                found[suffix] = readers[suffix]()
            except (OSError, DataError) as error:
                if not found:
                    reason = error.strerror if isinstance(error, OSError) else error
                    raise DataError(f"its {suffix} cannot be read: {reason}") from error
    texts = [found[each] for each in (CAPTION_SUFFIX, CAPTIONS_SUFFIX) if each in found]
    listed: tuple[str, ...] = ()
    if JSON_SUFFIX in found:
        try:
            values = parse_json(found[JSON_SUFFIX])
            listed = captions_of(values) if isinstance(values, dict) else ()
        except DataError:
            listed = ()  # about something else, such as the size of the picture
        except ValueError as error:
            if not texts:
                raise DataError(f"its .json is damaged ({_reason(error)})") from error
    if not texts:
        return listed, False
    first, others = parse_caption(texts[0]), {each.strip() for each in listed}
    with suppress(DataError):  # an empty file does not count
        others |= {parse_caption(each) for each in texts[1:]}
    if listed and listed[0].strip() == first:
        return listed, not others <= {each.strip() for each in listed}
    return [first], not others <= {first, ""}


def _jsonl(path: Path, table: Table) -> Table | None:
    """Read one object per line, or one JSON value in the whole file."""
    base = posixpath.basename(table.name)
    head = read_regular(path, most_bytes=_HEAD_BYTES, num_bytes=_HEAD_BYTES)
    is_named = base.lower() == "metadata.jsonl" or "caption" in base.lower()
    _check_encoding(head)
    end = "\r" if b"\r" in head and b"\n" not in head else "\n"
    first = _first_line(head.replace(b"\r", b"\n") if end == "\r" else head)
    if not is_named and first[:1] != b"[" and not _is_row(first):
        return None  # perhaps a long log: do not read all of it
    is_alone = len(head) < _HEAD_BYTES and first == head.strip()
    # An array, an object over several lines, or a single line with a mapping.
    if first[:1] == b"[" or first == b"{" or (is_alone and _is_mapping(first)):
        return _whole(read_regular(path, most_bytes=MAX_JSON_BYTES), table)
    table.is_sure = True
    with open_regular(path) as file:
        check_size(os.fstat(file.fileno()).st_size, MAX_TABLE_BYTES)
        for number, line in enumerate(_lines(file, end), start=1):
            if not line.strip():
                continue
            try:
                check_size(len(line), _MAX_LINE_BYTES)
                values = parse_json(line)
            except DataError:
                table.refuse(f"{base}:{number}", "not JSON: the line is too long")
            except ValueError as error:
                table.refuse(f"{base}:{number}", f"not JSON: {_what(error)}")
            else:
                table.take(values, number)
    return table


def _lines(file: IO[bytes], end: str) -> Iterator[bytes]:
    """Yield the lines of a file; lines longer than _MAX_LINE_BYTES are cut there."""
    # Decode bytes as Latin-1 and encode them again: only text files support other line ends.
    text = io.TextIOWrapper(file, "latin-1", newline=end)
    while line := text.readline(_MAX_LINE_BYTES + 1):
        rest = line
        while rest and not rest.endswith(end):
            rest = text.readline(_MAX_LINE_BYTES)
        yield line.encode("latin-1")


def _json(path: Path, table: Table) -> Table | None:
    content = read_regular(path, most_bytes=MAX_JSON_BYTES)
    _check_encoding(content)
    return _whole(content, table)


def _whole(content: bytes, table: Table) -> Table | None:
    """Read one JSON value; None when it has no captions."""
    check_size(len(content), MAX_JSON_BYTES)
    try:
        values = parse_json(content.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise ValueError(f"it is not JSON ({_reason(error)})") from error
    if isinstance(values, list):
        rows = [row for row in values if isinstance(row, dict)]
        if not any(_first_text(row, FILE_KEYS) and _has_caption(row) for row in rows):
            return None
        for number, row in enumerate(values, start=1):
            table.take(row, number)
        return table
    if not isinstance(values, dict):
        return None
    if isinstance(values.get("images"), list) and isinstance(values.get("annotations"), list):
        return _coco(values["images"], values["annotations"], table)
    table.is_guess = True
    for name, value in values.items():
        about = value if isinstance(value, dict) else {"caption": value}
        if _has_caption(about):
            table.rows.append(Row(name, captions_of(about)))
    return table if table.rows else None


def _coco(images: list[Any], annotations: list[Any], table: Table) -> Table | None:
    """Read COCO's form: names by id, and annotations with the id of their picture."""
    names = {}
    for image in images:
        number = image.get("id") if isinstance(image, dict) else None
        if isinstance(number, int | str) and (name := _first_text(image, FILE_KEYS)):
            names[number] = name
    captions: dict[str, list[str]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and isinstance(annotation.get("caption"), str):
            number = annotation.get("image_id")
            name = names.get(number) if isinstance(number, int | str) else None
            if name is not None:
                captions.setdefault(name, []).append(annotation["caption"])
    table.rows = [Row(name, tuple(texts)) for name, texts in captions.items()]
    return table if table.rows else None


def _csv(path: Path, table: Table) -> Table | None:
    head = read_regular(path, most_bytes=_HEADER_BYTES, num_bytes=_HEADER_BYTES)
    _check_encoding(head)
    header = head.splitlines()[0].decode("utf-8-sig", "replace") if head else ""
    separator = max(",;\t|", key=header.count)
    columns = [column.strip().strip('"').lower() for column in header.split(separator)]
    if not set(columns) & set(FILE_KEYS) or not set(columns) & set(CAPTION_KEYS):
        return None
    table.is_sure = True
    with open_regular(path) as file:
        check_size(os.fstat(file.fileno()).st_size, MAX_TABLE_BYTES)
        rows = csv_rows(_text_lines(file), separator)
        names = [name.strip() for name in next(rows)[1]]
        for number, cells in rows:
            row = {name: cell.strip() for name, cell in zip(names, cells, strict=False)}
            if len(cells) > len(names):
                reason = f"more fields than the header of {shown(table.name)}; quote the caption"
                table.refuse(_first_text(row, FILE_KEYS) or f"line {number}", reason)
            else:
                table.take(row, number)
    return table


def _text_lines(file: IO[bytes]) -> Iterator[str]:
    """Yield the lines of a text file with their ends; raises ValueError if it is not text."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        while line := text.readline(_MAX_LINE_BYTES):
            if len(line) == _MAX_LINE_BYTES:
                raise ValueError(f"it has a line of more than {_MAX_LINE_BYTES:,} characters")
            yield line
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None


def _parquet(path: Path, table: Table) -> Table | None:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        if not posixpath.basename(table.name).startswith("metadata."):
            return None
        raise MissingExtraError("pyarrow", "datasets") from error
    num_bytes = number = 0
    try:
        file = parquet.ParquetFile(path)
        lower = {field.name.lower(): field.name for field in file.schema_arrow}
        # The column `image` may contain pictures: then the file is a data set of `datasets`.
        pictures = {f.name for f in file.schema_arrow if pyarrow.types.is_nested(f.type)}
        files = [lower[k] for k in FILE_KEYS if k in lower and lower[k] not in pictures]
        captions = [lower[key] for key in CAPTION_KEYS if key in lower]
        if not files or not captions:
            return None
        for batch in file.iter_batches(batch_size=256, columns=files + captions):
            num_bytes += batch.nbytes  # the uncompressed size
            check_size(num_bytes, MAX_TABLE_BYTES)
            for row in batch.to_pylist():
                number += 1
                table.take(row, number)
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise ValueError(f"it is damaged ({_what(error)})") from error
    return table


_READERS = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _csv,
}


def _first_line(content: bytes) -> bytes:
    """Return the first line that is not blank."""
    start = content.removeprefix(b"\xef\xbb\xbf")[:_HEAD_BYTES].lstrip()
    return start.partition(b"\n")[0].strip()


def _is_mapping(line: bytes) -> bool:
    """Return whether a line is a JSON object, but not a row."""
    try:
        values = parse_json(line)
    except ValueError:
        return False
    keys = {str(key).strip().lower() for key in values} if isinstance(values, dict) else set()
    return bool(keys) and not keys & {*FILE_KEYS, *CAPTION_KEYS}


def _check_encoding(content: bytes) -> None:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16; save it as UTF-8")


def _is_row(line: bytes) -> bool:
    try:
        row = parse_json(line)
    except ValueError:
        return False
    return isinstance(row, dict) and bool(_first_text(row, FILE_KEYS)) and _has_caption(row)


def _has_caption(row: Mapping[str, Any]) -> bool:
    try:
        return bool(captions_of(row))
    except DataError:
        return False


def _first_text(values: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """Return the first text under one of `keys`, in upper or lower case."""
    lower = {str(key).strip().lower(): value for key, value in values.items()}
    found: Iterator[Any] = (lower.get(key) for key in keys)
    return next((each for each in found if isinstance(each, str) and each), None)


def _keys(values: Mapping[str, Any]) -> str:
    names = [shown(str(key))[:40] for key in values]
    more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    return f"{', '.join(names[:_SHOWN_KEYS])}{more}" if names else "no keys"


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _what(error: Exception) -> str:
    """Return what is wrong with JSON, without the place, so that equal reasons can be counted."""
    return _reason(error).partition(": line ")[0]
