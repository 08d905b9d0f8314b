"""StageIO: the one declaration of a stage's tensors, from which everything about shapes follows.

Axes are written as words: an integer is fixed, a name is free ("B", "L"), and outputs may use sums
and products of both ("P+L", "16*h"). ONNX names, dynamic axes, engine profiles, buffers and input
checks are computed from it.
"""

import ast
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nsp.errors import ConfigError, FeedError

Shape: TypeAlias = tuple[int, ...]
Sizes: TypeAlias = Mapping[str, int]


class Fed(Protocol):
    """What is known of an array of any backend that is fed to a stage."""

    @property
    def shape(self) -> Shape:
        """The shape."""

    @property
    def dtype(self) -> Hashable:
        """NumPy's or torch's."""


_MAX_AXIS = 80  # characters

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1}
DTYPES = tuple(ITEM_BYTES)


def array_bytes(shape: Shape, dtype: str) -> int:
    """Return the bytes of a packed array."""
    return math.prod(shape) * ITEM_BYTES[dtype]


@dataclass(frozen=True)
class Axes:
    """One tensor: its axes as words ("B 3 16*h 16*w"; "" is a scalar) and its dtype."""

    axes: str
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Check the dtype and that every axis is valid."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for word in self.words:
            _parse_axis(word)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The axes, one word each."""
        return tuple(self.axes.split())

    def shape(self, sizes: Sizes) -> Shape:
        """Return the shape for given sizes of the free axes; KeyError names a missing one."""
        return tuple(_evaluate(_parse_axis(word), sizes) for word in self.words)


@cache
def _parse_axis(word: str) -> ast.expr:
    """Return the expression of one axis: names, integers, + and *, or ConfigError."""
    try:
        if len(word) > _MAX_AXIS:  # the parser would end in a recursion or memory error
            raise TypeError
        expression = ast.parse(word, mode="eval").body
        _evaluate(expression, _AnySize())
    except (SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(
            f"axis {word[:_MAX_AXIS]!r} is not a name, an integer, or a sum or product of them"
        ) from error
    return expression


class _AnySize(dict[str, int]):
    """Sizes in which every name is 1, to check the form of an expression."""

    def __missing__(self, key: str) -> int:
        return 1


def _evaluate(node: ast.expr, sizes: Sizes) -> int:
    if isinstance(node, ast.Name):  # the two common cases first, without the cost of patterns
        return sizes[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluate(left, sizes) + _evaluate(right, sizes)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _evaluate(left, sizes) * _evaluate(right, sizes)
    raise TypeError(ast.dump(node))


@dataclass(frozen=True)
class StageIO:
    """Named inputs and outputs of one stage, in order."""

    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]

    @cached_property
    def free_axes(self) -> tuple[str, ...]:
        """Names of the free axes, in order of appearance in the inputs."""
        words = (word for spec in self.inputs.values() for word in spec.words)
        return tuple(dict.fromkeys(word for word in words if word.isidentifier()))

    def input_shapes(self, sizes: Sizes) -> dict[str, Shape]:
        """Return the shape of every input."""
        return {name: spec.shape(sizes) for name, spec in self.inputs.items()}

    def output_shapes(self, sizes: Sizes) -> dict[str, Shape]:
        """Return the shape of every output."""
        return {name: spec.shape(sizes) for name, spec in self.outputs.items()}

    def check(self, feeds: Mapping[str, Fed], stage: str) -> dict[str, int]:
        """Return the sizes of the free axes found in `feeds` .

        Raises FeedError naming the tensor that is missing, unknown, or of another shape or dtype
        than declared.
        """
        if feeds.keys() != self.inputs.keys():
            odd = sorted(feeds.keys() ^ self.inputs.keys())[0]
            state = "unknown" if odd in feeds else "missing"
            raise FeedError(
                f"{stage}: {state} input {odd!r}; the inputs are {', '.join(self.inputs)}"
            )
        sizes: dict[str, int] = {}
        for name, spec in self.inputs.items():
            shape = tuple(feeds[name].shape)
            if len(shape) == len(spec.words):
                for word, size in zip(spec.words, shape, strict=True):
                    if word.isidentifier():
                        sizes.setdefault(word, size)
            if len(shape) != len(spec.words) or shape != spec.shape(sizes):
                known = " ".join(f"{k}={v}" for k, v in sizes.items() if k in spec.words)
                given = f" with {known}" if known else ""
                raise FeedError(f"{stage}: {name} has shape {shape}; expected ({spec.axes}){given}")
            dtype = _dtype_name(feeds[name].dtype)
            if dtype != spec.dtype:
                raise FeedError(f"{stage}: {name} is {dtype}; expected {spec.dtype}")
        return sizes

    def profile(self, sizes: Sequence[Sizes]) -> dict[str, tuple[Shape, Shape, Shape]]:
        """Return (min, opt, max) shapes of every input over several sizes, the last being opt."""
        shapes = [self.input_shapes(each) for each in sizes]
        return {
            name: (
                tuple(map(min, zip(*(s[name] for s in shapes), strict=True))),
                shapes[-1][name],
                tuple(map(max, zip(*(s[name] for s in shapes), strict=True))),
            )
            for name in self.inputs
        }

    def to_dict(self) -> dict[str, dict[str, list[str]]]:
        """Return plain dictionaries for a manifest."""
        return {
            side: {name: [spec.axes, spec.dtype] for name, spec in getattr(self, side).items()}
            for side in ("inputs", "outputs")
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Return the declaration written by `to_dict`; raise ConfigError when it is not one."""
        if not isinstance(values, Mapping) or values.keys() != {"inputs", "outputs"}:
            raise ConfigError(
                "the declaration of a stage must be an object with inputs and outputs"
            )
        return cls(*(_tensors(values[side], side) for side in ("inputs", "outputs")))


def _tensors(declared: object, side: str) -> dict[str, Axes]:
    """Return the inputs or outputs of a stage; raise ConfigError naming a damaged one."""
    if not isinstance(declared, Mapping):
        raise ConfigError(f"{side} must be an object of tensors")
    found = {}
    for name, spec in declared.items():
        match spec:
            case [str(axes), str(dtype)]:
                found[name] = Axes(axes, dtype)
            case _:
                raise ConfigError(f"{side}: tensor {name!r} must be two texts: [axes, dtype]")
    return found


@cache  # NumPy takes 3 us to name a dtype, and this runs for every tensor of every stage call
def _dtype_name(dtype: Hashable) -> str:
    """Return the name of a NumPy or torch dtype."""
    return str(dtype).removeprefix("torch.")


def sample_arrays(io: StageIO, sizes: Sizes, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return arrays of the declared shapes: normal floats, zero integers.

    For shape checks, never for parity.
    """
    rng = np.random.default_rng(seed)
    result: dict[str, NDArray[Any]] = {}
    for name, spec in io.inputs.items():
        shape = spec.shape(sizes)
        if spec.dtype in ("int64", "bool"):
            result[name] = np.zeros(shape, spec.dtype)
        else:
            result[name] = rng.standard_normal(shape).astype(
                "float32" if spec.dtype == "bfloat16" else spec.dtype
            )
    return result
