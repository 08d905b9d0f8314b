"""`index.json` next to packed shards: their content, known without opening them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nsp.config import Config
from nsp.data.bounds import read_regular
from nsp.errors import ConfigError, DataError

INDEX_FILE = "index.json"
_MAX_BYTES = 128 << 20  # some 600,000 shards


@dataclass(frozen=True, kw_only=True)
class ShardRecord(Config):
    """One shard."""

    file: str
    num_samples: int
    num_train: int  # samples that are not held out
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardIndex(Config):
    """The shards of a folder, in order. Each begins with the list of held-out samples."""

    format: Literal["nsp-shards"] = "nsp-shards"
    version: Literal[1] = 1
    num_samples: int
    num_heldout: int
    class_names: tuple[str, ...]
    shards: tuple[ShardRecord, ...]


def parse_index(text: str | bytes, *, where: str) -> ShardIndex | None:
    """Return the index, None if the file is from another program; DataError when damaged."""
    try:
        values: Any = json.loads(text)
        if not isinstance(values, dict) or values.get("format") != "nsp-shards":
            return None
        return ShardIndex.from_dict(values)
    except (ValueError, RecursionError, ConfigError) as error:
        raise DataError(f"{where} is damaged ({error}); delete it, or pack again") from error


def read_index(folder: Path) -> ShardIndex | None:
    """Return the index of a folder, or None without one; DataError when damaged."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    try:
        content = read_regular(path, most_bytes=_MAX_BYTES)
    except DataError as error:
        raise DataError(f"{path} is damaged ({error}); delete it, or pack again") from error
    return parse_index(content, where=str(path))
