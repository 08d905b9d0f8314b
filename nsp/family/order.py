"""An order is one image to make, and a step is the state after a part of the work; no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from nsp import values
from nsp.config import Config
from nsp.errors import ConfigError
from nsp.files import read_array
from nsp.stage.arena import Array
from nsp.stage.io import Shape

Unit: TypeAlias = Literal["scale", "row", "tokens", "timestep"]


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """Base of a family's settings of one image; every field has a default."""

    def changed(self, settings: Mapping[str, object], *, beside: tuple[str, ...] = ()) -> Self:
        """Return these settings with some replaced; ConfigError for an unknown or wrong one.

        `beside` names further arguments of the caller, for the message about an unknown name.
        """
        known = [*beside, *(each.name for each in fields(self))]
        if unknown := [name for name in settings if name not in known]:
            raise ConfigError(f"unknown argument {unknown[0]!r}{values.nearest(unknown[0], known)}")
        return self.from_dict({**self.to_dict(), **settings})

    @property
    def sorted_codes(self) -> int:
        """How many of the largest logits must be sorted whichever stage draws; 0 for none."""
        return 0

    @property
    def greedy(self) -> str | None:
        """The setting that gives every seed the same image, in words; None if seeds matter."""
        return None

    def num_ranks(self, num_codes: int) -> int:
        """Return how many of the largest of `num_codes` logits must be ranked; 1 if none."""
        return 1


S = TypeVar("S", bound=Sampling)
S_co = TypeVar("S_co", bound=Sampling, covariant=True)


@dataclass(frozen=True, eq=False)
class Order(Generic[S_co]):
    """One image. Its content depends on nothing else, also not on other orders of its batch.

    Raises ConfigError for a wrong seed, whatever the model; `Pipeline.run` checks the rest before
    its first step.
    """

    condition: str | int | None  # a prompt, a class, or nothing
    seed: int
    sampling: S_co
    negative: str | None = None  # a prompt instead of guidance's null condition
    given: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # for one image, without B

    def __post_init__(self) -> None:
        """Check the seed and the kind of `given`; numbers of NumPy become Python's own."""
        object.__setattr__(self, "seed", values.seed(self.seed))
        if self.condition is not None and values.is_integer(self.condition):
            object.__setattr__(self, "condition", int(self.condition))
        if not isinstance(self.given, Mapping):
            raise ConfigError(f"given={values.shown(self.given)} must map names to arrays")


@dataclass(frozen=True)
class Given:
    """An array that an order may have instead of random or sampled values."""

    shape: Shape  # of one image
    dtype: str
    least: float | None = None  # smallest value; None: any finite one
    below: float | None = None  # all values are smaller
    help: str = ""  # of the option of `nsp generate`, which takes a file
    read: Callable[[Path], NDArray[Any]] = read_array  # how a file becomes the array

    def check(self, name: str, array: object) -> None:
        """Raise ConfigError unless `array` is allowed under this name."""
        expected = f"expected a NumPy array, {self.dtype} {self.shape}"
        if not isinstance(array, np.ndarray):
            raise ConfigError(f"{name} is a {type(array).__name__}; {expected}")
        if array.shape != self.shape or array.dtype != np.dtype(self.dtype):
            raise ConfigError(f"{name} is {array.dtype} {array.shape}; {expected}")
        if self.least is None or self.below is None:
            if not bool(np.isfinite(array).all()):
                raise ConfigError(f"{name} must be finite, but it contains NaN or infinity")
        elif not bool(((array >= self.least) & (array < self.below)).all()):  # also false for NaN
            raise ConfigError(f"{name} must be in [{self.least:g}, {self.below:g}), but is not")


@dataclass(frozen=True)
class Encoded:
    """The encoded prompts of a batch, made outside the recorded loop."""

    # Outputs of the stage text_encoder, rows first: row i is the prompt of image i. If any image
    # has its own null prompt, row B + i is that of image i, and N is 2B.
    states: Mapping[str, NDArray[Any]]
    # (N, T) for those rows: 1 for tokens, 0 for padding, which may come first; its sum over T is
    # the length of a prompt.
    mask: NDArray[np.int64]
    empty: NDArray[np.bool_]  # (B,) whether the prompt has the same tokens as ""
    has_null: NDArray[np.bool_]  # (B,) whether the image has a null prompt, in row B + i

    @property
    def num_prompts(self) -> int:
        """N; a learned null condition is row N of the stage that reads the prompts."""
        return int(next(iter(self.states.values())).shape[0])

    def null_rows(self) -> NDArray[np.int64]:
        """Return the row of every image's null condition: its own prompt, or the learned one."""
        batch = len(self.empty)
        own = np.arange(batch, 2 * batch, dtype=np.int64)
        return np.where(self.has_null, own, np.int64(self.num_prompts))


@dataclass(frozen=True)
class Step:
    """The state after one step of a loop; arrays are the backend's."""

    index: int
    total: int
    unit: Unit
    latent: Array | None  # decodes to a picture; None in the middle of one
    # "tokens" (B, L), and "logits" (B, L, V) for a trace; each as its parts along L. A family may
    # have further results, images first.
    drawn: Mapping[str, tuple[Array, ...]] = field(default_factory=dict)


def stacked(
    orders: Sequence[Order[S]],
    name: str,
    drawn: Callable[[Order[S]], NDArray[Any]],
) -> NDArray[Any]:
    """Return one array for all orders, (B, ...): the given one under `name`, or a drawn one.

    For an order that occurs several times, as padding does, numbers are drawn once.
    """
    rows = {o: o.given[name] if name in o.given else drawn(o) for o in dict.fromkeys(orders)}
    return np.stack([rows[order] for order in orders])


def stream(seed: int, purpose: int = 0) -> np.random.Generator:
    """Return the generator of one image's random numbers of one kind."""
    key = np.array([values.seed(seed), 0], np.uint64)
    counter = np.array([0, 0, 0, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
