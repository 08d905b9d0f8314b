"""Recorded stage calls, and the file with the few calls that an engine folder keeps.

With that file an engine folder can be checked without PyTorch. This module needs neither torch nor
the exporter.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.artifacts.engine_files import check_files
from nsp.artifacts.manifest import Manifest
from nsp.errors import CheckpointError, EngineError
from nsp.sniff import sniff
from nsp.stage.arena import KVShape, is_cached
from nsp.weights.weight_files import read_arrays, read_metadata, write_safetensors

_FILE = "calls.safetensors"
_SCHEMA = 2


@dataclass(frozen=True)
class Call:
    """One call of a stage: inputs and outputs, in float32 as PyTorch has them.

    The past is not recorded, because earlier calls added it. If several stages share the cache, the
    outputs also have the added part, `new_*` (L, G, H, K).
    """

    stage: str
    step: int  # step of the loop; decoding afterwards counts as one more step
    feeds: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    num_new: int = 0  # tokens added to the cache
    rows: int = 0  # rows of the cache; 0 without one
    is_compared: bool = True  # False: it is only needed to fill the cache

    @cached_property
    def new(self) -> dict[str, NDArray[Any]]:
        """The outputs that were added to the cache."""
        return {name: array for name, array in self.outputs.items() if is_cached(name)}


@dataclass(frozen=True)
class Recording:
    """Calls of one batch, in order, and the size of its cache."""

    calls: tuple[Call, ...]
    kv: KVShape | None  # None: without a cache
    unit: str  # of the loop's steps
    num_steps: int

    @cached_property
    def has_cache(self) -> bool:
        """Whether calls have the part that they added to a cache shared by several stages."""
        return any(call.new for call in self.calls)


def write_recorded(recordings: Sequence[Recording], folder: Path, *, model_hash: str) -> None:
    """Write recordings to `folder`; an array that occurs in several calls is stored once."""
    arrays: dict[str, NDArray[Any]] = {}

    def keep(tensors: Mapping[str, NDArray[Any]]) -> dict[str, str]:
        names = {name: array_key(array) for name, array in tensors.items()}
        arrays.update((names[name], packed(array)) for name, array in tensors.items())
        return names

    plan = [
        {
            "kv": None if recording.kv is None else asdict(recording.kv),
            "unit": recording.unit,
            "num_steps": recording.num_steps,
            "calls": [
                {
                    "stage": call.stage,
                    "step": call.step,
                    "feeds": keep(call.feeds),
                    "outputs": keep(call.outputs),
                    "num_new": call.num_new,
                    "rows": call.rows,
                    "is_compared": call.is_compared,
                }
                for call in recording.calls
            ],
        }
        for recording in recordings
    ]
    metadata = {"schema": str(_SCHEMA), "model_hash": model_hash, "plan": json.dumps(plan)}
    write_safetensors(arrays, folder / _FILE, metadata=metadata)


def packed(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array contiguous; a scalar stays a scalar."""
    return np.ascontiguousarray(array).reshape(array.shape)


def array_key(array: NDArray[Any]) -> str:
    """Return a name that is the same for equal arrays."""
    content = f"{array.dtype}{array.shape}".encode() + packed(array).tobytes()
    return hashlib.sha256(content).hexdigest()[:24]


def read_recorded(folder: Path, manifest: Manifest) -> tuple[Recording, ...]:
    """Return the recordings of an engine folder.

    Raises EngineError when there are none, or they are damaged or of another model.
    """
    if not manifest.recorded:
        raise EngineError(f"{folder} has no recorded outputs")
    check_files(folder, manifest.recorded)
    path = folder / next(iter(manifest.recorded))
    try:
        found = read_metadata(path)
        same_model = found.get("model_hash") == manifest.model_hash
        if found.get("schema") != str(_SCHEMA) or not same_model:
            raise EngineError(
                f"{path} belongs to another model or version; export the folder again"
            )
        arrays = read_arrays(path)
        return tuple(_recording(each, arrays) for each in json.loads(found["plan"]))
    except CheckpointError as error:
        words = sniff(path).words
        raise EngineError(f"{path} {words} and is damaged; export the folder again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{path} is damaged ({error}); export the folder again") from error


def _recording(stored: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Recording:
    """Return one recording of the file."""

    def found(names: Mapping[str, str]) -> dict[str, NDArray[Any]]:
        return {name: arrays[key] for name, key in names.items()}

    calls = (
        Call(**{**call, "feeds": found(call["feeds"]), "outputs": found(call["outputs"])})
        for call in stored["calls"]
    )
    kv = None if stored["kv"] is None else KVShape(**stored["kv"])
    return Recording(tuple(calls), kv, stored["unit"], stored["num_steps"])
