"""Checkpoint folders of any family: config.json says which family reads the rest."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsp.config import Config
from nsp.errors import CheckpointError, ConfigError
from nsp.families.registry import Family, family
from nsp.files import name_failed_write, read_json, write_folder
from nsp.runtime.manifest import file_sha256
from nsp.runtime.sampling import SamplingConfig
from nsp.weight_files import read_arrays, write_safetensors

CONFIG_NAME = "config.json"


@dataclass(frozen=True, kw_only=True)
class ConfigFile(Config):
    """The keys of config.json."""

    family: str
    config: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@contextmanager
def write_checkpoint(folder: Path, about: ConfigFile) -> Iterator[Path]:
    """Yield a folder with config.json for the weights; it replaces `folder` once it is whole."""
    with write_folder(folder) as partial:
        (partial / CONFIG_NAME).write_text(json.dumps(about.to_dict(), indent=1) + "\n")
        yield partial


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """What config.json says."""

    folder: Path
    family: Family
    config: Mapping[str, Any]
    sampling: Mapping[str, Any] = field(default_factory=dict)  # settings that suit this model
    notes: Mapping[str, Any] = field(default_factory=dict)  # where the weights come from

    def load(self) -> Any:
        """Return the model with its weights (torch), in float32 and eval mode."""
        return self.family.get("load_checkpoint")(self.folder, self.config)

    def weights_hash(self) -> str:
        """Return the SHA-256 over config.json's model part and every other file, in name order.

        Not over a card (*.md): what is written about a model does not make it another one.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        files = (p for p in sorted(self.folder.rglob("*")) if p.is_file() and p.suffix != ".md")
        for path in files:
            name = str(path.relative_to(self.folder))
            if name != CONFIG_NAME:  # its notes may change without the model
                digest.update(name.encode() + file_sha256(path).encode())
        return digest.hexdigest()


def is_checkpoint(folder: Path) -> bool:
    """Return whether `folder` holds a checkpoint's config.json."""
    return (folder / CONFIG_NAME).is_file()


def read_checkpoint(folder: Path) -> CheckpointRecord:
    """Return the record of a checkpoint folder.

    Raises CheckpointError when config.json is missing or damaged, ConfigError for an unknown
    family.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint folder: {CONFIG_NAME} is missing")
    try:
        values = ConfigFile.from_dict(read_json(path))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); write the checkpoint again") from error
    record = family(values.family)
    try:
        record.get("config").from_dict(values.config)
        SamplingConfig.from_dict(values.sampling)
    except ConfigError as error:
        raise CheckpointError(
            f"{path} is damaged or of another nsp version ({error}); write the checkpoint again"
        ) from error
    return CheckpointRecord(
        folder=folder,
        family=record,
        config=values.config,
        sampling=values.sampling,
        notes=values.notes,
    )


def copy_in_half(source: Path, target: Path) -> None:
    """Copy a checkpoint folder with its float32 weights stored as float16: half the bytes.

    Loading gives float32 again, rounded to 11 bits of mantissa.
    """
    import numpy as np

    read_checkpoint(source)
    with write_folder(target) as partial:
        for path in (p for p in sorted(source.rglob("*")) if p.is_file()):
            copy = partial / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != ".safetensors":
                with name_failed_write(copy):
                    copy.write_bytes(path.read_bytes())
                continue
            halved = {
                name: array.astype(np.float16) if array.dtype == np.float32 else array
                for name, array in read_arrays(path).items()
            }
            write_safetensors(halved, copy, metadata={"format": "pt"})
