"""The captions of the training pictures as a frozen text encoder's states, computed once and kept.

Axes: U unique captions, T prompt tokens, W width of a state. States are float16. Those of a run lie
in a file that is mapped into memory, so that as much of it is in memory as there is room for.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nsp.errors import DataError
from nsp.family.objective import TokenCache
from nsp.files import write_file
from nsp.training.cache import digest_of_weights

logger = logging.getLogger(__name__)

_BATCH = 64  # captions read at once
_STEM = "text_states-"  # of the file's name; the digest of what decides its content follows
_DIGITS = 16

States: TypeAlias = NDArray[np.float16]


@dataclass(frozen=True)
class Reading:
    """The part of a model that makes states of captions."""

    module: nn.Module  # whose weights decide the states
    tokens: Callable[[Sequence[str]], Tensor]  # captions -> their token ids (N, T)
    states: Callable[[Tensor], Tensor]  # token ids (N, T) -> states (N, T, W)

    def key(self, captions: Sequence[str]) -> str:
        """Return the digest of what decides the states of these captions."""
        digest = digest_of_weights("text states", self.module, decides=lambda name: True)
        for start in range(0, len(captions), _BATCH):
            digest.update(self.tokens(captions[start : start + _BATCH]).numpy().tobytes())
        return digest.hexdigest()[:_DIGITS]


class TextStates:
    """The states of captions, by their place in the list; equal captions are kept once."""

    def __init__(
        self, reading: Reading, captions: Sequence[str], cache: TokenCache | None = None
    ) -> None:
        """Compute them, or read them from the folder of the run's `cache`.

        Without a folder of the run they stay in memory.
        """
        unique = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        self._rows = [unique[caption] for caption in captions]
        folder = None if cache is None or cache.is_given else cache.file.parent
        self._states = _kept(reading, list(unique), folder)

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        """Return the states (T, W) of one caption."""
        return torch.from_numpy(np.array(self._states[self._rows[index]]))


def _kept(reading: Reading, captions: list[str], folder: Path | None) -> States:
    """Return the states (U, T, W), from their file if a folder is given."""
    if folder is None or not captions:
        parts = [*_encoded(reading, captions)]
        return np.concatenate(parts) if parts else np.zeros((0, 0, 0), np.float16)
    file = folder / f"{_STEM}{reading.key(captions)}.npy"
    if not file.exists():
        _write(reading, captions, file)
    try:
        found: States = np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}); delete it to make it again") from error
    return found


def _write(reading: Reading, captions: list[str], file: Path) -> None:
    """Write the states a batch at a time, in place of those of other captions or weights."""
    started = time.monotonic()
    parts = _encoded(reading, captions)
    first = next(parts)
    shape = (len(captions), *first.shape[1:])
    with write_file(file) as partial, partial.open("wb") as target:
        head = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(target, head)
        target.write(first.tobytes())
        for part in parts:
            target.write(part.tobytes())
    for other in file.parent.glob(f"{_STEM}*.npy"):
        if other != file:
            other.unlink()
    logger.info("%s: states %s of captions, %.0f s", file, shape, time.monotonic() - started)


@torch.no_grad()
def _encoded(reading: Reading, captions: Sequence[str]) -> Iterator[States]:
    """Yield the states of the captions, a batch at a time."""
    for start in range(0, len(captions), _BATCH):
        states = reading.states(reading.tokens(captions[start : start + _BATCH]))
        yield np.ascontiguousarray(states.half().cpu().numpy())
