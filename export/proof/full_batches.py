"""Pads recorded calls of smaller batches for engines that need full ones, and cuts results."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nsp.stage.backend import Backend
from nsp.stage.io import Axes, StageIO

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Rows: TypeAlias = Mapping[str, NDArray[np.int64]]  # axis -> the given row that each row repeats


def full_size(backend: Backend) -> int | None:
    """Return the only number of images that a backend accepts; None if it accepts several."""
    return backend.batch_sizes[0] if len(backend.batch_sizes) == 1 else None


def full_rows(backend: Backend, io: StageIO, feeds: Arrays) -> Rows:
    """Return the rows that fill up a call, by axis (B images, G rows); empty if it is full.

    Engines for one batch size need all images with their null rows. If a stage has both axes, null
    rows follow the images; in a call without null rows, the images are used for them, with
    guidance 1.
    """
    full = full_size(backend)
    if full is None:
        return {}
    words = ((io.inputs[name].words, array.shape) for name, array in feeds.items())
    sizes = {w: n for axes, shape in words for w, n in zip(axes, shape, strict=True)}
    images, rows = sizes.get("B"), sizes.get("G")
    if max(images or 0, -(-(rows or 0) // 2)) > full:
        return {}  # larger than the engines allow, which they report
    found = {}
    if images is not None:
        found["B"] = np.minimum(np.arange(full), images - 1)
    if rows is not None and images is not None:
        found["G"] = np.concatenate([found["B"], found["B"] + rows - images])
    elif rows is not None:
        found["G"] = np.minimum(np.arange(2 * full), rows - 1)
    return found


def cache_rows(backend: Backend, past: Axes, rows: int) -> int:
    """Return the rows of a cache for full batches; `rows` if it is larger or any size fits."""
    full = full_size(backend)
    if full is None:
        return rows
    return max(rows, 2 * full if "G" in past.words else full)


def padded(array: NDArray[Any], rows: int, axis: int) -> NDArray[Any]:
    """Return `array` with its last row along `axis` repeated until there are `rows`."""
    count = array.shape[axis]
    if count >= rows:
        return array
    found: NDArray[Any] = np.take(array, np.minimum(np.arange(rows), count - 1), axis)
    return found


def kept_rows(rows: Rows) -> Rows:
    """Return the indices of the given rows among the full ones."""
    return {axis: np.unique(repeats, return_index=True)[1] for axis, repeats in rows.items()}


def take(arrays: Arrays, specs: Mapping[str, Axes], rows: Rows) -> dict[str, NDArray[Any]]:
    """Return arrays with the rows along the axes replaced as `rows` says."""
    found = dict(arrays)
    for name, array in arrays.items():
        for place, word in enumerate(specs[name].words):
            if word in rows:
                array = np.take(array, rows[word], place)
        found[name] = array
    return found
