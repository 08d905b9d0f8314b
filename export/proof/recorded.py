"""Recorded stage calls: how stages are fed them again, and a file of them in the engine folder.

With that file an engine folder can be checked where no PyTorch is installed. This module needs
neither torch nor the exporter.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.artifacts.engine_files import check_files
from nsp.artifacts.manifest import Manifest
from nsp.errors import CheckpointError, EngineError
from nsp.sniff import sniff
from nsp.stage.arena import KVShape
from nsp.stage.backend import Backend
from nsp.stage.io import Axes, StageIO
from nsp.weights.weight_files import read_arrays, read_metadata, write_safetensors

_FILE = "calls.safetensors"
_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a precision must reach."""

    relative_error: float  # max abs error of an output over its range; logits and images aside
    logits_error: float  # the same of logits
    token_agreement: float  # of sampled tokens, per scale
    psnr_db: float  # of decoded images

    def allowed_flips(self, num_tokens: int) -> int:
        """Return how many tokens of a scale may differ: the share allowed, and what chance adds.

        Whether a draw falls beside an edge is luck, of which few tokens have much: three standard
        deviations of that many draws are granted.
        """
        share = 1 - self.token_agreement
        spread = (num_tokens * share * self.token_agreement) ** 0.5
        return int(num_tokens * share + 3 * spread + 1) if share else 0


LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(relative_error=1e-4, logits_error=1e-4, token_agreement=1.0, psnr_db=80),
    # Tokens and images are the gates in half precision; errors are held to what rounding can do.
    "fp16": Limits(relative_error=1e-2, logits_error=2e-2, token_agreement=0.99, psnr_db=45),
    # 8 bits of mantissa for 11: errors eight times as large.
    "bf16": Limits(relative_error=8e-2, logits_error=0.16, token_agreement=0.92, psnr_db=27),
    # Opt-in. Seen with a small trained model: 2.4 % of the range, 86 % of the worst scale.
    "int8": Limits(relative_error=5e-2, logits_error=5e-2, token_agreement=0.8, psnr_db=80),
}


@dataclass(frozen=True)
class Call:
    """One call of a stage: inputs and outputs, in float32 as PyTorch has them.

    Without the cache, unless several stages share it.
    """

    stage: str
    feeds: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    num_new: int  # tokens the cache grew by
    rows: int  # of the cache it met; 0 without one


@dataclass(frozen=True)
class Recording:
    """Calls of one batch, in order, and the size of its cache."""

    calls: tuple[Call, ...]
    kv: KVShape


Replayed = tuple[Call, Call | None, dict[str, NDArray[Any]]]


def replay(
    stage: str, io: StageIO, backend: Backend, calls: Sequence[Call], kv: KVShape
) -> Iterator[Replayed]:
    """Yield every recorded call of the stage, the call after it, and what the stage returns now.

    Inputs are the recorded ones; the key/value cache is the stage's own.
    """
    recorded = {name for call in calls if call.stage == stage for name in call.feeds}
    # Of a cache that stages share, the reference has every past.
    cached = [n for n in io.inputs if n.startswith("past_") and n not in recorded]
    arena = None
    if cached:
        arena = backend.new_arena(replace(kv, dtype=io.inputs[cached[0]].dtype))
    followers = (*calls[1:], None)
    for call, following in zip(calls, followers, strict=True):
        if call.stage != stage:
            continue
        feeds = {n: _upload(backend, array, io.inputs[n]) for n, array in call.feeds.items()}
        given: Mapping[str, Any] = {}
        if arena is not None:
            if call.rows < arena.shape.rows:  # guidance has ended
                arena.keep_rows(call.rows)
            feeds |= arena.past()
            given = arena.new(call.num_new)
        results = backend.run(stage, feeds, given)
        if arena is not None:
            arena.advance(call.num_new)
        yield call, following, {name: backend.download(results[name]) for name in call.outputs}


def _upload(backend: Backend, array: NDArray[Any], spec: Axes) -> Any:
    """Return an array of the reference in the dtype the stage takes."""
    if spec.dtype == "bfloat16":  # NumPy has none: the torch backend narrows it
        import torch

        tensor: Any = backend.upload(array)
        return tensor.to(torch.bfloat16)
    return backend.upload(np.asarray(array, spec.dtype))


def relative_error(expected: Any, found: Any) -> float:
    """Return the largest difference over the range of what was expected; not a number is inf."""
    if not expected.size:
        return 0.0
    wide = expected.astype(np.float64)
    worst = float(np.abs(wide - found.astype(np.float64)).max())
    if not np.isfinite(worst):
        return float("inf")
    span = float(np.ptp(wide))
    return worst / span if span else (0.0 if worst == 0 else float("inf"))


def write_recorded(recordings: Sequence[Recording], folder: Path, *, model_hash: str) -> None:
    """Write recordings to `folder`; an array that occurs in several calls is stored once."""
    arrays: dict[str, NDArray[Any]] = {}

    def keep(tensors: Mapping[str, NDArray[Any]]) -> dict[str, str]:
        names = {}
        for name, array in tensors.items():
            whole = np.ascontiguousarray(array).reshape(array.shape)
            digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + whole.tobytes())
            names[name] = digest.hexdigest()[:24]
            arrays[names[name]] = whole
        return names

    plan = [
        {
            "kv": asdict(recording.kv),
            "calls": [
                [call.stage, keep(call.feeds), keep(call.outputs), call.num_new, call.rows]
                for call in recording.calls
            ],
        }
        for recording in recordings
    ]
    metadata = {"schema": str(_SCHEMA), "model_hash": model_hash, "plan": json.dumps(plan)}
    write_safetensors(arrays, folder / _FILE, metadata=metadata)


def read_recorded(folder: Path, manifest: Manifest) -> tuple[Recording, ...]:
    """Return the recordings of an engine folder.

    Raises EngineError when there are none, they are damaged, or of another model.
    """
    if not manifest.recorded:
        raise EngineError(f"{folder} holds no recorded outputs")
    check_files(folder, manifest.recorded)
    path = folder / next(iter(manifest.recorded))
    try:
        found = read_metadata(path)
        same_model = found.get("model_hash") == manifest.model_hash
        if found.get("schema") != str(_SCHEMA) or not same_model:
            raise EngineError(f"{path} is of another model or version; export the folder again")
        arrays = read_arrays(path)
        return tuple(
            Recording(
                calls=tuple(
                    Call(
                        stage,
                        {name: arrays[key] for name, key in feeds.items()},
                        {name: arrays[key] for name, key in outputs.items()},
                        num_new,
                        rows,
                    )
                    for stage, feeds, outputs, num_new, rows in each["calls"]
                ),
                kv=KVShape(**each["kv"]),
            )
            for each in json.loads(found["plan"])
        )
    except CheckpointError as error:
        words = sniff(path).words
        raise EngineError(f"{path} {words} and is damaged; export the folder again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{path} is damaged ({error}); export the folder again") from error
