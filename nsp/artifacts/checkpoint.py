"""Checkpoint folders of any family: config.json names the family that reads the rest.

config.json also has the SHA-256 of every other file of the model and of its own content, so that a
folder that was damaged or changed is refused instead of giving other images. Only files listed
there are read. Older folders have no digests: they are loaded, with a log message.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from nsp.config import Config
from nsp.cores import usable_cores
from nsp.errors import CheckpointError, ConfigError
from nsp.family.contract import AnyFamily
from nsp.family.registry import family
from nsp.files import file_sha256, name_failed_write, write_file, write_folder
from nsp.paths import describe, wrong_path
from nsp.sniff import explain, sniff
from nsp.walk import files_below
from nsp.weights.weight_files import read_arrays, read_settings, write_safetensors

log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"


@dataclass(frozen=True, kw_only=True)
class ConfigFile(Config):
    """The keys of config.json."""

    family: str
    config: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # name -> SHA-256; none in older folders
    digest: str = ""  # SHA-256 of all the other keys


@contextmanager
def write_checkpoint(folder: Path, about: ConfigFile) -> Iterator[Path]:
    """Yield a folder for the weights; once complete, it replaces `folder` with config.json."""
    with write_folder(folder) as partial:
        yield partial
        _write_config(partial, about)


def write_digests(folder: str | Path) -> None:
    """Update the digests in a checkpoint's config.json to its present files."""
    _write_config(Path(folder), _read_config(Path(folder) / CONFIG_NAME))


def _write_config(folder: Path, about: ConfigFile) -> None:
    """Write config.json with the digests of the files in `folder`."""
    digests = _hash_files(folder, _files_of(folder))
    values = dataclasses.replace(about, files=digests, digest="").to_dict()
    values["digest"] = _own_digest(values)
    with write_file(folder / CONFIG_NAME) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n")


def _own_digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of config.json's keys except the digest, in a canonical form."""
    plain = json.loads(json.dumps({n: value for n, value in values.items() if n != "digest"}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _files_of(folder: Path) -> list[str]:
    """Return the names of the files a model consists of, in order.

    A model card (*.md) does not count: a text about a model does not change the model.
    """
    files = (path for path in files_below(folder) if path.suffix != ".md")
    names = (path.relative_to(folder).as_posix() for path in files)
    return [name for name in names if name != CONFIG_NAME]


def _hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """Return the SHA-256 of every file; 40 MB take 30 ms, 1.5 GB about a second per core.

    Raises CheckpointError for one that is missing or cannot be read.
    """

    def hashed(name: str) -> str:
        path = folder / name
        found = sniff(path)  # opening a pipe would block
        if found.kind == "missing":
            raise CheckpointError(
                f"{path} is missing; the checkpoint is incomplete, copy or write it again"
            )
        if found.kind in ("folder", "special", "link loop", "unreadable"):
            raise CheckpointError(explain(path, expected="a file of the model", found=found))
        try:
            return file_sha256(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error

    with ThreadPoolExecutor(usable_cores()) as pool:  # hashing releases the interpreter lock
        return dict(zip(names, pool.map(hashed, names), strict=True))


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """The content of config.json."""

    folder: Path
    family: AnyFamily
    config: Mapping[str, Any]
    sampling: Mapping[str, Any] = field(default_factory=dict)  # settings that suit this model
    notes: Mapping[str, Any] = field(default_factory=dict)  # where the weights come from
    files: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of each; empty: not known
    digest: str = ""
    verify: bool = True

    def load(self) -> Any:
        """Return the model with its weights (torch), in float32 and eval mode.

        Raises CheckpointError for a file that changed since it was written, unless verification is
        off, and for a folder that was replaced meanwhile.
        """
        if not self.files:
            log.info("%s was written before checkpoints had digests: not verified", self.folder)
        elif not self.verify:
            log.warning("%s is not verified: its files may belong to another model", self.folder)
        else:
            self.digests  # noqa: B018 - raises
        from nsp.artifacts.model_parts import load_system

        listed = frozenset(self.files) if self.files else None
        with _permitted(self.folder):
            system = load_system(self.folder, self.family, self.config, listed)
        if self.files and _read_config(self.folder / CONFIG_NAME).digest != self.digest:
            raise CheckpointError(f"{self.folder} was replaced while it was read; run it again")
        return system

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """The SHA-256 of every present file, by name, computed once.

        Raises CheckpointError for the first that differs from the listed one.
        """
        with _permitted(self.folder):
            found = _hash_files(self.folder, list(self.files) or _files_of(self.folder))
        for name, digest in self.files.items():
            if self.verify and found[name] != digest:
                raise CheckpointError(_why_different(self.folder, name))
        return found

    def weights_hash(self) -> str:
        """Return the SHA-256 over config.json's model part and every other file, in name order.

        Raises CheckpointError as `digests` does.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.digests, key=PurePosixPath):
            digest.update(name.encode() + self.digests[name].encode())
        return digest.hexdigest()


@contextmanager
def _permitted(folder: Path) -> Iterator[None]:
    """Turn missing permission to read a file or folder into a CheckpointError."""
    try:
        yield
    except PermissionError as error:
        raise CheckpointError(
            f"{error.filename or folder} cannot be read ({error.strerror}); allow it with chmod"
        ) from error


def _why_different(folder: Path, name: str) -> str:
    """Return the message for a file whose SHA-256 differs from the listed one."""
    path = folder / name
    found = sniff(path)
    if found.is_spoilt or (path.suffix == ".safetensors" and found.kind != "safetensors"):
        return explain(path, expected="a file of weights", found=found)
    return f"{path} changed since it was written (SHA-256); {_repair(folder)}"


def _repair(folder: Path) -> str:
    """Return what to do about a checkpoint that was changed."""
    code = f"from nsp.artifacts.checkpoint import write_digests; write_digests({str(folder)!r})"
    return (
        "copy the checkpoint again; if you changed it yourself, give --no-verify, or record the "
        f"change with: python -c {shlex.quote(code)}"
    )


def is_checkpoint(folder: Path) -> bool:
    """Return whether `folder` has a checkpoint's config.json, readable or not."""
    return sniff(folder / CONFIG_NAME).kind not in ("missing", "folder", "special", "link loop")


def check_new_checkpoint(folder: Path) -> None:
    """Raise ConfigError where a new checkpoint would replace anything but another one."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another --output-dir")
    if folder.is_dir() and any(folder.iterdir()) and describe(folder).kind != "checkpoint":
        raise ConfigError(
            f"{folder} is not empty and not a checkpoint; choose another --output-dir"
        )


def read_checkpoint(folder: Path, *, verify: bool = True) -> CheckpointRecord:
    """Return the record of a checkpoint folder; with `verify` its digests are checked.

    Raises CheckpointError when config.json is missing, damaged or changed, or lists a file that is
    not in the folder, ConfigError for an unknown family.
    """
    path = folder / CONFIG_NAME
    if not is_checkpoint(folder) or describe(folder).kind == "hub model":
        raise CheckpointError(wrong_path(folder, "checkpoint"))
    values = _read_config(path)
    _check_names(folder, values.files)
    has_digests = values.files or values.digest  # if only one exists, the other was removed
    if verify and has_digests and _own_digest(values.to_dict()) != values.digest:
        raise CheckpointError(
            f"{path} was changed since it was written (digest); {_repair(folder)}"
        )
    record = family(values.family)
    try:
        record.config.from_dict(values.config)
        record.sampling.from_dict(values.sampling)
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
        files=values.files,
        digest=values.digest,
        verify=verify,
    )


def _read_config(path: Path) -> ConfigFile:
    """Return config.json's content; CheckpointError if it is missing, damaged or unreadable."""
    if sniff(path).kind == "missing":
        raise CheckpointError(f"{path.parent} is not a checkpoint folder: {CONFIG_NAME} is missing")
    try:
        return ConfigFile.from_dict(read_settings(path))
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged ({error}); write the checkpoint again") from error


def _check_names(folder: Path, names: Mapping[str, str]) -> None:
    """Raise CheckpointError for a listed name that does not stay in the folder, links included."""
    for name in names:
        path = PurePosixPath(name)
        inside = not path.is_absolute() and ".." not in path.parts and "\0" not in name
        if not inside or path.as_posix() != name or name in (".", CONFIG_NAME):
            raise CheckpointError(f"{folder / CONFIG_NAME} lists {name!r}, which is not inside it")
        for each in (path, *path.parents[:-1]):
            if os.path.islink(folder / each):  # False without permission
                raise CheckpointError(
                    f"{folder / each} is a link, but the files of a checkpoint must be in its "
                    "folder; copy the folder with its files (cp -rL) and use the copy"
                )


def copy_in_half(source: Path, target: Path) -> None:
    """Copy a checkpoint folder with its float32 weights stored as float16: half the bytes.

    Loading gives float32 again, rounded to 11 bits of mantissa.
    """
    import numpy as np

    record = read_checkpoint(source)
    names = list(record.digests)  # verified
    cards = [p.relative_to(source).as_posix() for p in files_below(source) if p.suffix == ".md"]
    with write_checkpoint(target, _read_config(source / CONFIG_NAME)) as partial:
        for name in (*names, *cards):
            path, copy = source / name, partial / name
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
