"""Writes a parity failure to a folder from which Polygraphy alone can reproduce it.

The folder has the graph, the inputs of the failing call with its cache, and PyTorch's outputs, in
Polygraphy's JSON. The error names the command.
"""

import logging
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.errors import ParityError
from nsp.export.proof.recorded import Call
from nsp.stage.arena import Array, is_cached
from nsp.stage.backend import Backend

logger = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]


@contextmanager
def reproducible(
    backend: Backend,
    stage: str,
    calls: Sequence[Call],
    *,
    allowed: Callable[[str, NDArray[Any]], float],
    graph: Path | None,
    folder: Path,
) -> Iterator[Backend]:
    """Yield `backend`, observed: a ParityError in the block names a command to reproduce it.

    `calls` are the recorded ones; the block repeats those of `stage`, in order. `allowed` is the
    largest absolute error of an output. `graph` is the graph for ONNX Runtime, None for another
    runtime. The files go to a new folder next to `folder`. An error that is not visible in the
    outputs of one call, such as too many different tokens, does not change.
    """
    watched = _Watched(backend)
    try:
        yield watched
    except ParityError as error:
        if graph is None or not watched.num_runs:
            raise
        repeated = [c for c in calls if c.stage == stage and (c.is_compared or not c.new)]
        expected = {  # where past and new are returned together, this is never recorded
            name: array
            for name, array in repeated[watched.num_runs - 1].outputs.items()
            if not (is_cached(name) and backend.kv_layout in ("present", "in_place"))
        }
        limits = {name: allowed(name, array) for name, array in expected.items()}
        if all(_within(watched.results[name], expected[name], limits[name]) for name in expected):
            raise
        try:
            made = _new_folder(folder, stage)
            command = write_repro(made, graph, watched.feeds, expected, limits)
        except (ImportError, OSError) as problem:
            logger.warning("the failure cannot be saved for Polygraphy: %s", problem)
            raise error from None
        raise ParityError(f"{error}; to reproduce it, run: {command}") from error


def write_repro(
    folder: Path, graph: Path, feeds: Arrays, expected: Arrays, allowed: Mapping[str, float]
) -> str:
    """Write one call to `folder` and return the command that runs and compares it.

    `allowed` is the largest absolute error of every output. The command ends with exit code 1 if
    one is beyond it, otherwise with 0.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    for path in graph.parent.iterdir():
        if path.is_file():  # the graph and its weights; copies, because users may change them
            shutil.copyfile(path, folder / path.name)
    inputs, outputs = folder / "inputs.json", folder / "outputs.json"
    results = RunResults()
    results.add([dict(expected)], runner_name="PyTorch")
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # it would write to standard output
        save_json([dict(feeds)], str(inputs))
        results.save(str(outputs))
    command = ["polygraphy", "run", str(folder / graph.name), "--onnxrt"]
    command += ["--load-inputs", str(inputs), "--load-outputs", str(outputs)]
    command += ["--rtol", "0", "--atol", *(f"{name}:{most:.9g}" for name, most in allowed.items())]
    return shlex.join(command)


def _new_folder(beside: Path, stage: str) -> Path:
    """Return a new empty folder for a failure of `stage`, in the temporary folder if needed."""
    target = beside.absolute()
    try:
        return Path(tempfile.mkdtemp(prefix=f"{target.name}-parity-{stage}-", dir=target.parent))
    except OSError:  # the place of the engines may not be writable
        return Path(tempfile.mkdtemp(prefix=f"nsp-parity-{stage}-"))


def _within(found: NDArray[Any], expected: NDArray[Any], allowed: float) -> bool:
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    return bool((difference <= allowed).all())  # False for NaN


class _Watched(Backend):
    """A backend that keeps the inputs and outputs of its last run."""

    name = "watched"

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend.stages_io)
        self.kv_layout, self._backend = backend.kv_layout, backend
        self.batch_sizes = backend.batch_sizes
        self.num_runs = 0
        self._feeds: Mapping[str, Array] = {}
        self._results: Mapping[str, Array] = {}

    @property
    def feeds(self) -> dict[str, NDArray[Any]]:
        """The inputs of the last run."""
        return {name: self.download(array) for name, array in self._feeds.items()}

    @property
    def results(self) -> dict[str, NDArray[Any]]:
        """The outputs of the last run."""
        return {name: self.download(array) for name, array in self._results.items()}

    def run(
        self, stage: str, feeds: Mapping[str, Array], outputs: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Return the outputs of the backend's stage."""
        results = self._backend.run(stage, feeds, outputs)
        self.num_runs += 1
        self._feeds, self._results = feeds, results
        return results

    def upload(self, array: NDArray[Any]) -> Array:
        """Return the backend's own array."""
        return self._backend.upload(array)

    def download(self, array: Array) -> NDArray[Any]:
        """Return a NumPy copy."""
        return self._backend.download(array)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Return uninitialised memory of the backend."""
        return self._backend.allocate(shape, dtype)

    def copy_rows(self, source: Array, target: Array) -> None:
        """Fill `target` with the first rows of `source`."""
        self._backend.copy_rows(source, target)
