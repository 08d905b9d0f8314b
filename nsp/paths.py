"""What is at a path, and what to type instead: every message about a wrong path comes from here.

Engine folders, checkpoints, runs, weights and data sets are all given as paths, and sooner or later
a user gives one where another is expected. A command that does not find what it needs asks here
what is there instead. Nothing is loaded, and only Python's own library is needed.
"""

import errno
import itertools
import json
import os
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from nsp.sniff import sniff

# What a command may want at a path; an option's name: the command has the other one as well.
Wanted: TypeAlias = Literal[
    "engines", "--engine-dir", "checkpoint", "--checkpoint", "--start-from", "model", "data"
]

_NEEDED = {
    "engines": "an engine folder (with manifest.json) is needed here",
    "--engine-dir": "an engine folder (with manifest.json) is needed here",
    "checkpoint": "a checkpoint folder (with config.json) is needed here",
    "--checkpoint": "a checkpoint folder (with config.json) is needed here",
    "--start-from": "a checkpoint folder (with config.json) is needed here",
    "model": "an engine folder (manifest.json) or a checkpoint folder (config.json) is needed here",
    "data": "a data set is needed here",
}
_HUB_KEYS = {"_class_name", "_diffusers_version", "architectures", "model_type"}
_MAX_CONFIG = 1 << 20  # bytes of a config.json that are read
_MAX_LOOKED = 2000  # entries of a folder that are examined
_MAX_BELOW = 50  # folders inside it that are examined
# The kind of a folder by the file suffixes in it; the first match counts.
_CONTENTS = (
    ("parquet", "contains parquet files", (".parquet", ".arrow")),
    ("shards", "contains .tar files (shards)", (".tar",)),
    (
        *("pictures", "is a folder of pictures"),
        (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    ),
    (
        *("weights folder", "is a folder of weights files"),
        (".safetensors", ".pth", ".pt", ".bin", ".ckpt"),
    ),
    ("onnx", "contains ONNX models without the manifest of an engine folder", (".onnx",)),
)
_WEIGHTS = {
    "safetensors": "is a weights file (safetensors)",
    "torch": "is a weights file (torch.save)",
    "legacy torch": "is a weights file (torch.save before torch 1.6)",
}


@dataclass(frozen=True)
class Found:
    """What is at a path."""

    kind: str
    words: str  # the text after the path: "is an engine folder"
    path: Path
    model: Path | None = None  # the checkpoint or engine folder that is meant
    remedy: str = ""  # what to do about it, whatever kind was expected


def describe(path: Path) -> Found:
    """Return what is at a path; never raises, and never waits for a pipe or device."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return _unreachable(path, error)
    except ValueError:
        return Found("missing", "is not a path: no file name can have its characters", path)
    if not stat.S_ISDIR(mode):
        return _file(path)
    try:
        with os.scandir(path) as entries:
            names = {entry.name for entry in itertools.islice(entries, _MAX_LOOKED)}
    except OSError as error:
        return Found("unreadable", f"is a folder that cannot be read ({error.strerror})", path)
    return _folder(path, names)


def wrong_path(path: Path, wanted: Wanted, found: Found | None = None) -> str:
    """Return the error for a path that is not `wanted`: what is there, and what to type."""
    found = found or describe(path)
    return f"{path} {found.words}; {_advice(found, wanted)}"


# For these kinds the message can only say that the expected thing is not there.
NOTHING = ("missing", "empty", "folder", "onnx", "unfinished export")


def check_output(folder: Path, option: str = "--output-dir") -> None:
    """Raise OSError when results cannot go into `folder`, because a file is in the way."""
    for each in (folder, *folder.parents):
        if each.is_dir():
            return
        if os.path.lexists(each):
            words = "is a file" if each.is_file() else describe(each).words
            where = "" if each == folder else f"is inside {each}, which "
            problem = f"{where}{words}; choose another {option}"
            raise NotADirectoryError(errno.ENOTDIR, problem, str(folder))


def _unreachable(path: Path, error: OSError) -> Found:
    if error.errno == errno.ELOOP:
        return Found("link loop", "is a link that leads back to itself", path)
    if error.errno == errno.ENAMETOOLONG:
        return Found("missing", "is longer than a file name may be", path)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if os.path.islink(path):
            target = os.readlink(path)
            return Found("broken link", f"is a link to {target}, which does not exist", path)
        return Found("missing", "does not exist", path)
    return Found("unreadable", f"cannot be read ({error.strerror})", path)


def _file(path: Path) -> Found:
    """Return what a file is; a file of a model folder stands for that folder."""
    sniffed = sniff(path)
    if sniffed.is_spoilt:
        return Found("spoilt", sniffed.words, path, remedy=sniffed.remedy)
    around = path.absolute().parents[:3]  # manifest.json, or stage/variant/model.onnx
    for folder in around:
        if (kind := _model_folder(folder)) is not None:
            words = "an engine folder" if kind == "engines" else "a checkpoint folder"
            return Found("inside", f"is a file of {words}", path, folder)
    if sniffed.kind in _WEIGHTS:
        return Found("weights", _WEIGHTS[sniffed.kind], path)
    return Found(sniffed.kind, sniffed.words, path)


def _model_folder(folder: Path) -> str | None:
    if (folder / "manifest.json").is_file():
        return "engines"
    return "checkpoint" if _config_kind(folder / "config.json") == "checkpoint" else None


def _folder(path: Path, names: set[str]) -> Found:
    """Return what a folder is, by the names in it."""
    if "manifest.json" in names:
        return Found("engines", "is an engine folder", path, path)
    if "run.json" in names:
        model = path / "checkpoint"
        if (model / "config.json").is_file():
            return Found("run", "is the folder of a training run", path, model)
        return Found("run", "is the folder of a training run that has no checkpoint yet", path)
    if ".export" in names:
        return Found("unfinished export", "contains an export that was not finished", path)
    if "about.json" in names:
        return Found("saved step", "is a saved step of a training run", path)
    config = _config_kind(path / "config.json")
    if config == "checkpoint":
        return Found("checkpoint", "is a checkpoint folder", path, path)
    if "model_index.json" in names or config is not None:
        return Found("hub model", "is a model folder of Hugging Face", path)
    if "config.json" in names and not (path / "config.json").is_dir() and config is None:
        # A pipe, a device or a broken link named config.json: it is still a model folder.
        found = describe(path / "config.json")
        remedy = found.remedy or "copy the folder again, with the file itself"
        return Found("spoilt", f"has a config.json that {found.words}", path, remedy=remedy)
    if not names:
        return Found("empty", "is an empty folder", path)
    return _by_content(path, names)


def _config_kind(path: Path) -> str | None:
    """Return whose config.json this is: "checkpoint" for ours, even if it is damaged."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_CONFIG else None
    except (OSError, ValueError, RecursionError):
        values = None
    is_hub = (
        isinstance(values, dict) and "family" not in values and not _HUB_KEYS.isdisjoint(values)
    )
    return "hub model" if is_hub else "checkpoint"


def _by_content(path: Path, names: set[str]) -> Found:
    """Return what a folder is, by the kinds of files in it and in the folders below."""
    folders = sorted(names)[:_MAX_BELOW]
    for name in folders:
        if (kind := _model_folder(path / name)) is not None:
            words = "an engine folder" if kind == "engines" else "a checkpoint folder"
            return Found("around", f"contains {words}, {name}/", path, path / name)
    below = itertools.chain.from_iterable(_names_in(path / name) for name in folders)
    suffixes = {Path(name).suffix.lower() for name in itertools.chain(names, below)}
    for kind, words, wanted in _CONTENTS:
        if not suffixes.isdisjoint(wanted):
            return Found(kind, words, path)
    return Found("folder", "is a folder of another kind", path)


def _names_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in itertools.islice(entries, 100)]
    except OSError:
        return []


def _advice(found: Found, wanted: Wanted) -> str:
    """Return what to do with what was found in place of what was wanted."""
    path, needed = shlex.quote(str(found.path)), _NEEDED[wanted]
    if found.remedy:
        return found.remedy
    if found.model is not None:
        return _for_model(found, shlex.quote(str(found.model)), wanted)
    if wanted == "data" and found.kind == "parquet":
        return f"use: hf:{path}"
    told = {
        "run": f"continue it with: python train.py --resume --output-dir {path}",
        "saved step": f"continue its run with: python train.py --resume-from {path}",
        "unfinished export": f"finish it with: nsp export --engine-dir {path}",
        "weights": "use: nsp convert, which makes a checkpoint of such files",
        "weights folder": "use: nsp convert, which makes a checkpoint of such files",
        "parquet": f"{needed} (data of train.py: --data hf:{path})",
        "shards": f"{needed} (data of train.py: --data {path})",
        "pictures": f"{needed} (data of train.py: --data {path})",
        "hub model": f"{needed} (train.py takes such parts with --vae and --text-encoder)",
        "onnx": f"{needed}; make one with: nsp export",
    }
    return told.get(found.kind, needed)


def _for_model(found: Found, model: str, wanted: Wanted) -> str:
    """Return how to use the model folder that is at a path, inside it, or around it."""
    assert found.model is not None
    is_engines = _model_folder(found.model) == "engines"
    of_checkpoints = ("checkpoint", "--checkpoint", "--start-from")
    taken = ("engines", "--engine-dir") if is_engines else of_checkpoints
    if wanted in (*taken, "model"):
        return f"use: {model}"
    if is_engines:
        return f"use: --engine-dir {model}" if wanted == "--checkpoint" else _NEEDED[wanted]
    if wanted == "engines":
        return f"make engines from it with: nsp export --checkpoint {model}"
    return f"use: --checkpoint {model}" if wanted == "--engine-dir" else _NEEDED[wanted]
