"""Finds, reads and writes files of tensors; their content, not their name, decides the format.

Only this package and saved training steps (nsp/training/checkpoints.py) use `torch.load`,
`safe_open` and `load_file`. Torch is imported only for torch tensors; the rest needs only NumPy and
safetensors.
"""

import argparse
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nsp.errors import CheckpointError
from nsp.files import name_failed_write, name_problem, read_json
from nsp.sniff import explain, sniff

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Arrays = dict[str, NDArray[np.generic]]

log = logging.getLogger(__name__)

WEIGHTS = "a safetensors file, or a torch file of tensors,"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TORCH_KINDS = ("torch", "legacy torch", "pickle")
_FORBIDDEN = re.compile(r"GLOBAL (\S+) was not an allowed global|got <class '([^']+)'>")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\b")
_DOS_FOLDER = 0x10  # bit in the attributes of an archive's part
_CHUNK = 1 << 20  # bytes read at once
_NUM_SHOWN = 4  # files or names of a list that are shown


def require_file(path: Path, *, expected: str = WEIGHTS) -> None:
    """Raise CheckpointError if `path` is surely a mistake; it says what it is and what to do."""
    if problem := name_problem(path):
        raise CheckpointError(f"{path} {problem}")
    found = sniff(path)
    if found.kind == "missing":
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete, write it again")
    if found.is_spoilt:
        raise CheckpointError(explain(path, expected=expected, found=found))


def read_settings(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model; CheckpointError says what else the file is."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        found = sniff(path)
        if found.is_spoilt or found.kind not in ("json", "text"):
            said = explain(path, expected="a JSON object", found=found)
            raise CheckpointError(said) from error
        raise CheckpointError(f"{path} is damaged ({error}); copy the folder again") from error


def listed_in(listed: Collection[str] | None, part: str) -> frozenset[str] | None:
    """Return the listed names inside the folder `part`, relative to it; None means any name."""
    if listed is None:
        return None
    return frozenset(n.removeprefix(f"{part}/") for n in listed if n.startswith(f"{part}/"))


def find_weights(
    folder: Path, stems: Sequence[str], *, what: str, listed: Collection[str] | None = None
) -> tuple[Path, ...]:
    """Return the safetensors files with the weights of a Hugging Face folder.

    `stems` are the names to look for ("model", "diffusion_pytorch_model"), `what` is the model in
    words. They are one file, or the shards of an index; otherwise the variant `fp16`, or the only
    other variant (`non_ema`), with a warning. With `listed` only those names are considered. Raises
    CheckpointError naming the existing files, or a missing shard.
    """
    names = sorted(path.name for path in folder.iterdir())
    if listed is not None:
        names = [name for name in names if name in listed]
    found = {stem: _variants(stem, names) for stem in stems}
    for variant in ("", "fp16"):
        for stem in stems:
            if variant in found[stem]:
                return _files_of(folder, found[stem][variant], names)
    others = [name for stem in stems for name in found[stem].values()]
    if len(others) == 1:
        log.warning("%s has only a variant of the weights: using %s", folder, others[0])
        return _files_of(folder, others[0], names)
    if others:
        raise CheckpointError(
            f"{folder} has several variants ({', '.join(sorted(others)[:_NUM_SHOWN])}); rename "
            f"the one you want to {stems[0]}.safetensors"
        )
    raise CheckpointError(_no_weights(folder, stems, names, what))


def _variants(stem: str, names: Sequence[str]) -> dict[str, str]:
    """Return {variant: file, or index of shards}; "" is the plain variant."""
    single = re.compile(rf"{re.escape(stem)}(?:\.([\w-]+))?\.safetensors")
    index = re.compile(rf"{re.escape(stem)}\.safetensors\.index(?:\.([\w-]+))?\.json")
    found: dict[str, str] = {}
    for pattern in (index, single):  # a single file counts before an index
        for name in names:
            if (match := pattern.fullmatch(name)) and not _SHARD.search(name):
                found[match[1] or ""] = name
    return found


def _files_of(folder: Path, name: str, names: Sequence[str]) -> tuple[Path, ...]:
    return shards_of(folder / name, names) if name.endswith(".json") else (folder / name,)


def shards_of(index: Path, names: Collection[str] | None = None) -> tuple[Path, ...]:
    """Return the files that an index (`*.safetensors.index.json`) names, each in its folder.

    Raises CheckpointError for a name that leads out of the folder and for a missing shard.
    """
    weight_map = read_settings(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of names to files; copy it again")
    shards = sorted({str(name) for name in weight_map.values()})
    for name in shards:
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file of its own folder")
        if not (index.parent / name).is_file() or (names is not None and name not in names):
            raise CheckpointError(
                f"{index.parent / name} is missing, one of {len(shards)} files of these weights; "
                "download it again"
            )
    return tuple(index.parent / name for name in shards)


def _no_weights(folder: Path, stems: Sequence[str], names: Sequence[str], what: str) -> str:
    """Return the error message for a folder without readable weights."""
    missing = f"{folder} has no {stems[0]}.safetensors"
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        return (
            f"{missing}; pickled weights ({pickles[0]}) are not read: save the {what} again with "
            "safe_serialization=True"
        )
    if shards := [name for name in names if _SHARD.search(name)]:
        return f"{missing}.index.json, which says what is in {shards[0]}; download it too"
    more = f", and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    held = f"it contains {', '.join(names[:_NUM_SHOWN])}{more}" if names else "it is empty"
    return f"{missing}; {held}; download or copy it again"


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a safetensors file's tensors from its header.

    Raises CheckpointError when it is missing, damaged or something else.
    """
    require_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; raises CheckpointError like `read_shapes`."""
    require_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def read_arrays(path: Path) -> "Arrays":
    """Return a safetensors file's tensors in NumPy; raises CheckpointError like `read_shapes`."""
    from safetensors.numpy import load_file

    require_file(path)
    try:
        arrays: Arrays = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return arrays


def read_safetensors(path: Path) -> "dict[str, Tensor]":
    """Return all tensors of a safetensors file; CheckpointError when it is missing or damaged."""
    from safetensors.torch import load_file

    require_file(path)
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    return state


def _damaged(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a file that exists and is complete but cannot be read."""
    found = sniff(path)
    if found.kind == "safetensors":
        return CheckpointError(f"{path} is damaged ({error}); download or copy it again")
    return CheckpointError(explain(path, expected="a safetensors file", found=found))


def read_tensor_file(path: Path) -> Any:
    """Return the content of a file of weights: tensors by name, or nested objects around them.

    The bytes tell how to read it. An index (`*.safetensors.index.json`) stands for its shards.
    Pickles are read as weights only. Raises CheckpointError saying what is there instead.
    """
    found = sniff(path)
    if found.kind == "missing":
        raise CheckpointError(f"{path} does not exist; give the file of a published state dict")
    if found.is_spoilt:
        raise CheckpointError(explain(path, expected=WEIGHTS, found=found))
    if found.kind == "safetensors":
        return read_safetensors(path)
    if found.kind == "json" and path.name.endswith(".json") and ".index" in path.name:
        return {n: t for shard in shards_of(path) for n, t in read_safetensors(shard).items()}
    if found.kind not in _TORCH_KINDS:
        raise CheckpointError(explain(path, expected=WEIGHTS, found=found))
    return _read_torch(path)


def _read_torch(path: Path) -> Any:
    """Return the content of a file written by torch.save, without running code from it."""
    import torch

    _check_archive(path)
    try:
        # torch judges a path by its suffix, and gives misleading warnings about damaged pickles.
        # Trainers keep their options beside the weights; a Namespace runs no code.
        with (
            path.open("rb") as file,
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make an unpickler raise anything
        # torch's message advises to load it anyway, which would run code from the file.
        raise CheckpointError(f"{path} cannot be read as weights only: {_why(error)}") from error
    size = path.stat().st_size
    for name, tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = "no numbers" if tensor.device.type == "meta" else f"a {tensor.layout} tensor"
            raise CheckpointError(
                f"{path}: tensor {name} contains {kind}; save the model's plain weights"
            )
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"{path}: tensor {name} {tuple(tensor.shape)} is larger than the whole file; save "
                "it with .contiguous()"
            )
    return content


def _why(error: Exception) -> str:
    """Return why torch refused a file, and what to do."""
    if found := _FORBIDDEN.search(str(error)):
        return (
            f"it also contains an object of class {found[1] or found[2]}, and unpickling a class "
            "may run code; save only its state dict, best as .safetensors"
        )
    if "TorchScript" in str(error):
        return "it is a TorchScript program; save the state dict of the model in it"
    return (
        "it is damaged, or contains objects besides tensors; save only its state dict, best as "
        ".safetensors"
    )


def _check_archive(path: Path) -> None:
    """Raise CheckpointError for an archive that changed in any bit since torch wrote it.

    torch does not compress, so an archive cannot be larger in memory than on disk; and it writes
    the CRC-32 of every part, but does not check it when reading.
    """
    name = "its list of parts"
    try:
        if not zipfile.is_zipfile(path):
            return  # an older format, or an incomplete file, which torch reports
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise CheckpointError(
                    f"{path} was compressed after torch wrote it; unpack and save it again"
                )
            if not any(part.CRC for part in parts):  # torch.serialization.set_crc32_options
                log.warning("%s was saved without checksums, so damage cannot be detected", path)
                return
            for part in parts:
                name = part.filename
                # Python and torch's reader would understand these differently: torch uses the other
                # size, and does not fill the memory of a part that is marked as a folder.
                is_folder = bool(part.external_attr & _DOS_FOLDER) and part.file_size > 0
                if part.file_size != part.compress_size or is_folder:
                    raise zipfile.BadZipFile("two sizes of a part, or a folder with content")
                with archive.open(part) as file:
                    while file.read(_CHUNK):  # raises at the end if the CRC-32 differs
                        pass
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is damaged: {name} has changed (CRC-32); download or copy it again"
        ) from error


def _tensors(value: Any, name: str = "", depth: int = 8) -> "list[tuple[str, Tensor]]":
    """Return the tensors in nested objects with their names."""
    import torch

    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if not isinstance(value, Mapping) or not depth:
        return []
    return [
        pair
        for key, child in value.items()
        for pair in _tensors(child, f"{name}.{key}" if name else str(key), depth - 1)
    ]


def write_safetensors(
    tensors: Mapping[str, Any], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write NumPy or torch arrays; OSError naming `path` when that fails."""
    with name_failed_write(path):
        if any(type(tensor).__module__.startswith("torch") for tensor in tensors.values()):
            from safetensors.torch import save_file as save_torch

            save_torch(dict(tensors), path, metadata=metadata)
        else:
            from safetensors.numpy import save_file as save_numpy

            save_numpy(dict(tensors), path, metadata=metadata)
        give_usual_mode(path)


def give_usual_mode(path: Path) -> None:
    """Give a file the permissions that the user's umask allows.

    safetensors writes a file that only its owner may read, and renames it.
    """
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    try:
        probe.touch()  # os.umask can be read only by changing it, for all threads
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink(missing_ok=True)
