"""Opens an engine folder: checks it, chooses a backend, loads its stages."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from nsp.families.registry import Family
from nsp.runtime.backends.base import Backend
from nsp.runtime.manifest import Manifest
from nsp.text.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class Engines:
    """An engine folder, loaded."""

    manifest: Manifest
    family: Family
    backend: Backend
    tokenizer: PromptTokenizer | None
    max_batch: int | None


def open_engine_dir(folder: Path, backend: str = "auto", **options: Any) -> Engines:
    """Return the loaded engines of `folder`."""
    raise NotImplementedError
