"""Lists a data set of Hugging Face's `datasets`: a saved folder, a folder of files, or a name.

    FOLDER_OR_NAME[:SPLIT]     without SPLIT: `train`, or the only one

Columns are found by type: the only Image column; the only column of strings or lists of strings, or
if there are several, the one called `caption`, `captions`, `text` or `prompt`; the only ClassLabel
column, whose class names become the captions if no column has text. A folder may have a list
`__heldout__` (see heldout.py); samples are named by split and row, as in `train-12`.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsp.data.bounds import MAX_PICTURE_BYTES, read_regular
from nsp.data.heldout import read_heldout
from nsp.data.listing import Listing
from nsp.data.report import first
from nsp.errors import DataError, MissingExtraError

logger = logging.getLogger(__name__)

_LIBRARIES = ("datasets", "huggingface_hub", "httpx", "fsspec", "urllib3")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt")


@dataclass(frozen=True)
class Cell:
    """The picture in one row."""

    path: Path  # path of the data set
    column: str
    row: int
    table: Any  # datasets.Dataset with that column, undecoded

    def size(self) -> int:
        """Return 0, because the length of a cell is known only when it is read."""
        return 0

    def read(self) -> bytes:
        """Return the bytes of the picture; raises OSError, or DataError with only the reason."""
        try:
            value = self.table[self.row][self.column]
        except (ValueError, RuntimeError, OSError) as error:  # pyarrow raises these
            raise DataError(f"the row cannot be read: {_line(error)}") from error
        if value is None:
            raise DataError("the row has no picture")
        content = value["bytes"]
        if content is not None:
            return bytes(content)
        if value["path"] is None:
            raise DataError("the row has no picture")
        return read_regular(Path(value["path"]), most_bytes=MAX_PICTURE_BYTES)


def list_rows(spec: str) -> Listing:
    """Return the rows of one split; raises DataError if the set or a column is ambiguous."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets") from error
    name, wanted = _parted(spec)
    split, table = _one_split(_load(name), name, wanted)
    image, caption, label = _columns(name, table.features)
    pictures = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    names = tuple(table.features[label].names) if label else ()
    rows = table.select_columns([column for column in (caption, label) if column])[:]
    listing = Listing(class_names=names, heldout=read_heldout(Path(name)))
    listing.missing = None if caption is None else f"no text in column {caption}"
    for row in range(len(table)):
        sample = f"{split}-{row}"
        number = rows[label][row] if label else None
        class_id = number if number is not None and number >= 0 else None  # -1: not labelled
        texts: Sequence[str] = ()
        if caption is not None:
            texts = _texts(rows[caption][row])
        elif class_id is not None:
            texts = (names[class_id],)
        elif label is not None:
            listing.refuse(sample, f"no class in column {label}")
            continue
        listing.add(sample, texts, Cell(Path(name), image, row, pictures), class_id)
    return listing


def _texts(value: str | list[str | None] | None) -> list[str]:
    """Return the captions in a cell, which has one text or a list."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if text is not None]


def _parted(spec: str) -> tuple[str, str | None]:
    """Return the folder or name, and the split if one is given."""
    name, colon, split = spec.rpartition(":")
    return (name, split) if colon and not Path(spec).exists() else (spec, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars and retries of the libraries; failures are reported in our messages."""
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def _load(name: str) -> Any:
    """Return a Dataset or DatasetDict."""
    import datasets

    folder = Path(name)
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        with _quiet():
            return datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except ConnectionError as error:
        raise DataError(
            f"hf:{name}: it is not a folder and not in the cache of `datasets`, and the hub "
            f"cannot be reached ({_line(error)}); give a folder, or use a machine with network"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"hf:{name}: `datasets` cannot load it ({_line(error)}); give a folder written by "
            "save_to_disk, one that load_dataset reads, or a name on the hub"
        ) from error


def _one_split(loaded: Any, name: str, wanted: str | None) -> tuple[str, Any]:
    """Return a split and its name."""
    if not isinstance(loaded, dict):  # saved as a single split
        own = str(loaded.split or "row")
        if wanted not in (None, own):
            raise DataError(f"hf:{name} has only one split, {own}; omit :{wanted}")
        return own, loaded
    splits = ", ".join(loaded)
    split = wanted or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if split not in loaded:
        raise DataError(f"hf:{name} has no split {split}; choose hf:{name}:SPLIT from {splits}")
    return split, loaded[split]


def _columns(name: str, features: Any) -> tuple[str, str | None, str | None]:
    """Return the columns of pictures, captions and classes; None for a missing one."""
    import datasets

    def of(wanted: type) -> list[str]:
        return [column for column, feature in features.items() if isinstance(feature, wanted)]

    texts = [column for column, feature in features.items() if _holds_text(feature)]
    images, labels = of(datasets.Image), of(datasets.ClassLabel)
    known = [column for column in texts if column in CAPTION_COLUMNS]
    texts = texts if len(texts) < 2 else known or texts
    what = f"columns are {first(list(features))}"
    if len(images) != 1:
        raise DataError(
            f"hf:{name}: {_found(images)} of type Image, but exactly one is needed; {what}"
        )
    if len(texts) > 1:
        raise DataError(
            f"hf:{name}: {_found(texts)} may have the caption; keep one, or rename one to caption"
        )
    if len(labels) > 1:
        raise DataError(f"hf:{name}: {_found(labels)} of type ClassLabel; keep one")
    if not texts and not labels:
        logger.warning(
            "hf:%s: no column of text or of type ClassLabel, so no captions; %s", name, what
        )
    return images[0], texts[0] if texts else None, labels[0] if labels else None


def _holds_text(feature: Any) -> bool:
    """Return whether a column has a string, or a list of strings, in each row."""
    inner = getattr(feature, "feature", feature)  # of Sequence and List
    if isinstance(inner, list):
        inner = inner[0] if len(inner) == 1 else None
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _found(columns: list[str]) -> str:
    return f"{len(columns)} columns ({first(columns)})" if columns else "no column"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
