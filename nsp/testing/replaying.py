"""A backend that records a loop and repeats its calls, as CUDA graphs are repeated, on any machine.

The first inputs of a kind run the loop; all later ones of the same names, shapes and dtypes repeat
the recorded stage calls on the same memory, and no line of the loop runs. A loop that looks at
values, uploads, downloads or keeps something of its own gives other numbers here than in a plain
run, or an error.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nsp.backends.torch import TorchBackend
from nsp.errors import BackendError
from nsp.family.order import Step
from nsp.stage.backend import Loop, T


@dataclass(frozen=True)
class _Recording:
    """Where the inputs lie, and for every result what is done before it is yielded."""

    inputs: Mapping[str, Tensor]
    parts: list[tuple[list[Callable[[], object]], Any]]


class ReplayingBackend(TorchBackend):
    """The torch backend on a CPU, repeating what it has recorded."""

    name: ClassVar[str] = "replaying"
    records: ClassVar[bool] = True

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.recordings: dict[object, _Recording] = {}
        self._recorded: list[Callable[[], object]] | None = None  # of the current part

    def play(self, name: str, inputs: Mapping[str, NDArray[Any]], loop: Loop[T]) -> Iterator[T]:
        """Yield the loop's results: run once for inputs of a kind, repeated from then on."""
        key = (name, *((n, a.shape, a.dtype.str) for n, a in inputs.items()))
        if key not in self.recordings:
            self.recordings[key] = self._record(inputs, loop)
        recording = self.recordings[key]
        for place, array in zip(recording.inputs.values(), inputs.values(), strict=True):
            place.copy_(torch.from_numpy(np.array(array)))
        for work, result in recording.parts:
            for each in work:
                each()
            yield cast("T", _copied(result))

    def _record(self, inputs: Mapping[str, NDArray[Any]], loop: Loop[T]) -> _Recording:
        # Noise stands for the inputs: what the loop learns from values is wrong later.
        uploaded = {n: torch.zeros_like(self.upload(array)) for n, array in inputs.items()}
        parts: list[tuple[list[Callable[[], object]], Any]] = []
        self._recorded = []
        try:
            for result in loop(self, uploaded):
                parts.append((self._recorded, result))
                self._recorded = []
        finally:
            self._recorded = None
        return _Recording(uploaded, parts)

    def run(
        self, stage: str, feeds: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the outputs, which stay where they are when the call is repeated."""
        feeds, given = dict(feeds), dict(outputs or {})
        results = super().run(stage, feeds, given)
        if self._recorded is not None:
            results = {n: t if n in given else t.clone() for n, t in results.items()}
            again = super().run

            def repeat() -> None:
                for name, found in again(stage, feeds, given).items():
                    results[name].copy_(found)

            self._recorded.append(repeat)
        return results

    def upload(self, array: NDArray[Any]) -> Tensor:
        """Return a tensor; BackendError within a loop, which takes all from its inputs."""
        self._refuse("uploads")
        return super().upload(array)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy; BackendError within a loop, which may not look at values."""
        self._refuse("downloads")
        return super().download(array)

    def copy_rows(self, source: Any, target: Any) -> None:
        """Copy rows, now and when the loop is repeated."""
        super().copy_rows(source, target)
        if self._recorded is not None:
            again = super().copy_rows
            self._recorded.append(lambda: again(source, target))

    def _refuse(self, what: str) -> None:
        if self._recorded is not None:
            raise BackendError(f"the loop {what} while it is recorded")


def _copied(result: Any) -> Any:
    """Return a result that later repetitions do not overwrite."""
    if isinstance(result, Step):
        latent = None if result.latent is None else cast("Any", result.latent).clone()
        drawn = {
            name: tuple(cast("Any", part).clone() for part in parts)
            for name, parts in result.drawn.items()
        }
        return replace(result, latent=latent, drawn=drawn)
    return result.clone()
