"""Lists of images to generate: a text file of prompts, a CSV table or JSON lines.

prompts.txt    one prompt per line
images.csv     a header with the columns prompt (or text, caption) or class (or class_id: a number
               or a name), seed, negative_prompt and settings of the model, such as guidance_scale
images.jsonl   one object per line with those keys

Rows for a model that takes no condition have neither prompt nor class.
A table in a file with another suffix is not used as a list of prompts: if the first line of a text
file is a table's header or a JSON object, an error says so.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nsp import values
from nsp.csv_rows import CsvError, csv_rows
from nsp.errors import ConfigError

_MAX_BYTES = 64 << 20  # size of a list: enough for a million long prompts
_COLUMNS = {
    "prompt": "prompt",
    "text": "prompt",
    "caption": "prompt",
    "class": "class",
    "class_id": "class",
    "seed": "seed",
    "negative_prompt": "negative_prompt",
}
_KNOWN = "prompt (or text, caption), class (or class_id), seed, negative_prompt"
_DELIMITERS = (",", ";", "\t", "|")  # spreadsheets use different ones in different countries
_MAX_SEED = 2**63 - 1  # the same as for --seed


@dataclass(frozen=True)
class ListedImage:
    """One row of a list."""

    prompt: str | None = None
    class_id: int | None = None
    seed: int | None = None  # instead of the seed of the whole run
    negative: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # instead of the whole run's
    where: str = ""  # file and line, for messages
    class_name: str | None = None  # instead of its number, which only a model can tell


def read_list(
    path: Path, settings: Sequence[str] = (), *, has_condition: bool = True
) -> tuple[ListedImage, ...]:
    """Return the rows of a list, in order; at least one.

    `settings` are names of further columns: settings of the model, checked later.
    With `has_condition`, every row must have a prompt or a class.

    Raises ConfigError naming the file, and the line that has something wrong.
    """
    content = _read(path)
    suffix = path.suffix.lower()
    kind = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}.get(suffix, "text")
    _check_kind(path, kind, content)
    rows = {"csv": _csv_rows, "jsonl": _json_rows, "text": _text_rows}[kind](
        path, content, settings, has_condition
    )
    found = tuple(rows)
    if not found:
        raise ConfigError(f"{path} contains no prompts; write one per line")
    if {row.prompt is None for row in found} == {True, False}:
        raise ConfigError(
            f"{path} has prompts and classes, but a model takes only one kind; choose one"
        )
    return found


def _read(path: Path) -> bytes:
    """Return the content of a file or a pipe; ConfigError if it is too long."""
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ConfigError(
            f"{path} is larger than {_MAX_BYTES >> 20} MiB; split the list into several files"
        )
    return content.removeprefix(codecs.BOM_UTF8)


def _check_kind(path: Path, kind: str, content: bytes) -> None:
    """Raise ConfigError for a file whose content does not fit its suffix."""
    head = content[:4096].lstrip()
    if kind != "jsonl" and b"".join(head.split()).startswith((b'{"', b'[{"', b'["')):
        raise ConfigError(
            f"{path}, line 1: this is JSON, not {'a table' if kind == 'csv' else 'a prompt'}; "
            "write one object per line and call the file .jsonl"
        )
    if kind == "text" and _delimiter(head.partition(b"\n")[0]) is not None:
        raise ConfigError(
            f"{path}, line 1: this is the header of a table, not a prompt; call the file .csv"
        )


def _delimiter(header: bytes) -> str | None:
    """Return the delimiter of a table's header, None when the line is not a header."""
    text = header.decode("utf-8", "replace")
    for each in _DELIMITERS:
        names = [name.strip(" \r\"'").lower() for name in text.split(each)]
        words = all(re.fullmatch(r"\w+", name) for name in names)
        known = sum(name in _COLUMNS for name in names)
        if len(names) > 1 and words and (names[0] in _COLUMNS or known > 1):
            return each
    return None


def _text_rows(
    path: Path, content: bytes, settings: Sequence[str], has_condition: bool
) -> Iterator[ListedImage]:
    """Yield a prompt per line.

    Lines end with a line feed, or with carriage return and line feed; other separators of Unicode
    are part of a prompt.
    """
    for number, line in enumerate(content.replace(b"\r\n", b"\n").split(b"\n"), 1):
        prompt = _checked_text(path, number, _decoded(path, number, line))
        if prompt:
            yield ListedImage(prompt=prompt)


def _csv_rows(
    path: Path, content: bytes, settings: Sequence[str], has_condition: bool
) -> Iterator[ListedImage]:
    lines = content.replace(b"\r\n", b"\n").split(b"\n")
    texts = [_decoded(path, number, line) for number, line in enumerate(lines, 1)]
    header = next((line for line in lines if line.strip()), b"")
    delimiter = _delimiter(header) or ("\t" if path.suffix.lower() == ".tsv" else ",")
    names: list[str] | None = None
    try:
        for number, cells in csv_rows((text + "\n" for text in texts), delimiter):
            if names is None:
                names = _checked_columns(path, number, cells, settings, has_condition)
                continue
            if len(cells) != len(names):
                raise ConfigError(
                    f"{path}, line {number}: {len(cells)} cells, but the header has {len(names)}; "
                    'write quotes "…" around a text that contains the separator'
                )
            row = dict(zip(names, (cell.strip() for cell in cells), strict=True))
            yield _row(path, number, {n: _number(n, cell) for n, cell in row.items()})
    except CsvError as error:
        raise ConfigError(f"{path}, {error}") from error


def _number(name: str, cell: str) -> Any:
    """Return the value of a cell: a number, a truth value or a text; None if it is empty."""
    if name in ("prompt", "negative_prompt"):
        return cell
    if cell.isascii() and cell.removeprefix("-").isdigit() and len(cell) <= 20:
        return int(cell)
    if name == "class":
        return cell
    if not cell:
        return None
    if cell.lower() in ("true", "false"):  # spreadsheets write TRUE
        return cell.lower() == "true"
    try:
        return float(cell) if name != "seed" else cell
    except ValueError:
        return cell


def _json_rows(
    path: Path, content: bytes, settings: Sequence[str], has_condition: bool
) -> Iterator[ListedImage]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        text = _decoded(path, number, line)
        try:
            pairs = json.loads(text, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(pairs, _Pairs):
            raise ConfigError(
                f"{path}, line {number}: {values.shown(pairs)} is not an object; write "
                '{"prompt": "…", "seed": 1}'
            )
        given = [name for name, _ in pairs]
        names = _checked_columns(path, number, given, settings, has_condition)
        row = dict(zip(names, (value for _, value in pairs), strict=True))
        yield _row(path, number, row)


class _Pairs(list[tuple[str, Any]]):
    """The keys and values of a JSON object as written: keys may repeat."""


def _checked_columns(
    path: Path, number: int, given: list[str], settings: Sequence[str], has_condition: bool
) -> list[str]:
    """Return the field of each column; ConfigError for an unknown or repeated one."""
    names: list[str] = []
    for each in given:
        word = each.strip().lower().replace("-", "_")
        name = _COLUMNS.get(word, word if word in settings else None)
        if name is None:
            raise ConfigError(
                f"{path}, line {number}: column {values.shown(each)} is unknown; known: "
                f"{', '.join((_KNOWN, *settings))}"
            )
        kinds = {"prompt", "class"}
        if name in names or (name in kinds and kinds & set(names)):
            raise ConfigError(
                f"{path}, line {number}: column {values.shown(each)} repeats another column; "
                "keep one of them"
            )
        names.append(name)
    if has_condition and not {"prompt", "class"} & set(names):
        raise ConfigError(
            f"{path}, line {number}: there is no column prompt or class; known: {_KNOWN}"
        )
    return names


def _row(path: Path, number: int, given: Mapping[str, Any]) -> ListedImage:
    """Return one row; ConfigError naming its line for a value of the wrong kind."""
    line = f"{path}, line {number}"
    seed, negative = given.get("seed"), given.get("negative_prompt") or None
    if seed is not None:
        seed = values.integer(f"{line}: seed", seed, least=0, most=_MAX_SEED)
    if negative is not None and not isinstance(negative, str):
        raise ConfigError(f"{line}: negative_prompt is {values.shown(negative)}, not a text")
    others = {
        name: value
        for name, value in given.items()
        if name not in _COLUMNS.values() and value is not None
    }
    row = ListedImage(seed=seed, negative=negative, settings=others, where=line)
    if "class" in given:
        return _of_class(row, given["class"])
    if "prompt" not in given:  # of a model without condition
        return row
    prompt = given["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f"{line}: prompt is {values.shown(prompt)}; write what is to be shown")
    return replace(row, prompt=_checked_text(path, number, prompt.strip()))


def _of_class(row: ListedImage, given: Any) -> ListedImage:
    """Return the row with its class, which is given as a number or a name."""
    if isinstance(given, str):
        if not given.strip():
            raise ConfigError(f"{row.where}: class is {given!r}; write its number or its name")
        return replace(row, class_name=given.strip())
    return replace(row, class_id=values.integer(f"{row.where}: class", given, least=0))


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def _checked_text(path: Path, number: int, text: str) -> str:
    """Return a prompt without spaces around it; ConfigError when it is not plain text."""
    prompt = text.strip()
    odd = [c for c in prompt if unicodedata.category(c) in ("Cc", "Cs") and c != "\t"]
    if odd:
        raise ConfigError(
            f"{path}, line {number}: control character U+{ord(odd[0]):04X}; "
            "write plain text, one prompt per line"
        )
    return prompt
