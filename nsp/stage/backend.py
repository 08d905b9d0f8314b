"""The contract of a backend: it runs stages on named arrays and owns their memory."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from nsp.stage.arena import ARENAS, Array, KVArena, KVShape, is_cached
from nsp.stage.io import Shape, StageIO

TENSORRT_RANKS = 3839  # TensorRT's TopK allows K < 3840 (its documentation)

T = TypeVar("T")
Loop: TypeAlias = Callable[["Backend", Mapping[str, Array]], Iterator[T]]


class Backend(ABC):
    """Stages loaded for one device.

    Arrays are of the backend's own kind (NumPy, torch, device memory): callers only slice and
    reshape them. Outputs belong to the caller; those named in `outputs` are written into the arrays
    given there.
    """

    name: ClassVar[str]
    # Whether `play` repeats recorded work, so that the calls of stages cannot be timed.
    records: ClassVar[bool] = False
    kv_layout: str
    max_ranks: int | None = None  # how many of the largest numbers it can sort; None: no limit
    # Numbers of images that batches are padded to, in ascending order; empty: batches are not
    # padded. A backend has them if its engines allow no other sizes, or if it records loops.
    batch_sizes: tuple[int, ...] = ()

    def __init__(self, stages_io: Mapping[str, StageIO]) -> None:
        self.stages_io = stages_io

    @abstractmethod
    def run(
        self, stage: str, feeds: Mapping[str, Array], outputs: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Return all outputs of `stage`.

        Raises FeedError for wrong feeds and BackendError when the stage fails.
        """

    def when_loaded(self, call: Callable[[], None]) -> None:
        """Call `call` when no stage needs its files any more: now, or when all are loaded."""
        call()

    @abstractmethod
    def upload(self, array: NDArray[Any]) -> Array:
        """Return `array` on the device of this backend."""

    @abstractmethod
    def download(self, array: Array) -> NDArray[Any]:
        """Return a NumPy copy of an array that later steps will not overwrite."""

    @abstractmethod
    def allocate(self, shape: Shape, dtype: str) -> Array:
        """Return uninitialised memory."""

    @abstractmethod
    def copy_rows(self, source: Array, target: Array) -> None:
        """Fill `target` (P, N, ...) with the first N of `source` (P, G, ...)."""

    def fill_with_zeros(self, array: Array) -> None:
        """Fill an array (P, G, ...) with zeros."""
        self.copy_rows(self.upload(np.zeros(array.shape, str(array.dtype))), array)

    def arena(self, shape: KVShape) -> AbstractContextManager[KVArena]:
        """Lend an empty arena in this backend's layout; its views end with the `with` block."""
        return nullcontext(self.new_arena(shape))

    def new_arena(self, shape: KVShape) -> KVArena:
        """Return an arena with memory of its own."""
        return ARENAS[self.kv_layout](shape, self)

    def kv_dtype(self) -> str:
        """Return the dtype of keys and values; float32 if there is no cache."""
        specs = (spec for io in self.stages_io.values() for spec in io.outputs.items())
        return next((spec.dtype for name, spec in specs if is_cached(name)), "float32")

    def play(self, name: str, inputs: Mapping[str, NDArray[Any]], loop: Loop[T]) -> Iterator[T]:
        """Yield the results of `loop` on the uploaded `inputs`; they belong to the caller.

        A backend may record the work of the loop called `name` and repeat it for later inputs of
        the same names, shapes and dtypes. So a loop must depend on nothing else, must not upload or
        download anything, and must run its stages on the backend that it is given.
        """
        return loop(self, {name: self.upload(array) for name, array in inputs.items()})

    def scalar(self, value: float, dtype: str = "float32") -> Array:
        """Return a zero-dimensional array."""
        return self.upload(np.array(value, dtype))

    def padded_batch_size(self, num_images: int) -> int:
        """Return the number of images to which a batch of `num_images` is padded."""
        return next((size for size in self.batch_sizes if size >= num_images), num_images)
