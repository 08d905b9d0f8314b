"""Frozen configuration records with an exact round trip through plain dictionaries."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from nsp.errors import ConfigError
from nsp.values import integer, nearest, real, shown

_MOST = 2**64  # the largest integer: as large as seeds can be
# Far beyond any model: with more, torch and Python fail with errors of their own.
_MOST_COUNTED = 2**20
_MOST_ITEMS = 64  # items of a list of sizes, such as the levels of an autoencoder


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configuration records: `to_dict` and `from_dict` are inverses."""

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dictionaries, lists, numbers and strings (JSON-ready)."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Return the record described by `values`.

        Raises ConfigError naming a key that is unknown, missing or mistyped.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__}: expected a JSON object, got {shown(values)}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := [key for key in values if key not in fields]:
            near = nearest(str(unknown[0]), fields)
            raise ConfigError(f"{cls.__name__}: unknown key {unknown[0]!r}{near}")
        unset = (dataclasses.MISSING, dataclasses.MISSING)
        needed = [f.name for f in fields.values() if (f.default, f.default_factory) == unset]
        if missing := [name for name in needed if name not in values]:
            raise ConfigError(f"{cls.__name__}: key {missing[0]!r} is missing")
        hints = typing.get_type_hints(cls)
        parsed = {
            name: _parse(hints[name], value, f"{cls.__name__}.{name}")
            for name, value in values.items()
        }
        return cls(**parsed)

    def check_counts(
        self, where: str, *names: str, least: int = 1, most: int = _MOST_COUNTED
    ) -> None:
        """Raise ConfigError naming a field, or an item of a list, outside `least` to `most`."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, tuple | list):
                integer(f"{where}: {name}", value, least=least, most=most)
                continue
            if not 0 < len(value) <= _MOST_ITEMS:
                raise ConfigError(
                    f"{where}: {name} is a list of 1 to {_MOST_ITEMS} integers, not {shown(value)}"
                )
            for index, item in enumerate(value):
                integer(f"{where}: {name}[{index}]", item, least=least, most=most)

    def check_reals(self, where: str, *names: str, least: float, most: float) -> None:
        """Raise ConfigError naming a field that is not a finite number from `least` to `most`."""
        for name in names:
            real(f"{where}: {name}", getattr(self, name), least=least, most=most)

    def check_fractions(self, where: str, *names: str) -> None:
        """Raise ConfigError naming a rate that is not a probability below 1."""
        self.check_reals(where, *names, least=0, most=1)
        for name in names:
            if getattr(self, name) == 1:
                raise ConfigError(f"{where}: {name} must be below 1: nothing would be left")


class ModelConfig(Config):
    """Base of a family's configuration of a model."""

    if TYPE_CHECKING:  # a field, or a property of other fields

        @property
        def image_size_px(self) -> int:
            """Side of the square pictures it is trained on."""


def _plain(value: Any) -> Any:
    """Return `value` with records as dictionaries, tuples as lists, NumPy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.tolist()
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _parse(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the annotated type, or raise ConfigError naming the field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()  # Python's own numbers and lists
    if origin in (types.UnionType, typing.Union):
        return _parse_union(arguments, value, where)
    if isinstance(hint, type) and issubclass(hint, Config):
        return hint.from_dict(value)
    if origin is tuple and isinstance(value, list | tuple):
        items = enumerate(value)
        return tuple(_parse_item(arguments[0], item, f"{where}[{index}]") for index, item in items)
    if origin is dict and isinstance(value, Mapping):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint in (Any, object):
        return value
    if origin is typing.Literal:
        accepted = any(type(value) is type(option) and value == option for option in arguments)
    elif origin in (dict, tuple):
        accepted = False
    elif hint is float:
        accepted = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        accepted = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if accepted and isinstance(value, int) and not -_MOST < value < _MOST:
        raise ConfigError(f"{where}: an integer of {value.bit_length()} bits is too large")
    if not accepted:
        said = f"{shown(value)} is not allowed; expected {_in_words(hint)}"
        raise ConfigError(f"{where}: {said}")
    return float(value) if hint is float else value


def _parse_item(hint: Any, value: Any, where: str) -> Any:
    """Return an item of a list as `_parse` does; an error in a record names the item."""
    try:
        return _parse(hint, value, where)
    except ConfigError as error:
        said = str(error)
        raise ConfigError(said if said.startswith(where) else f"{where}: {said}") from error


def _parse_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return `value` as the first of the allowed types that accepts it.

    Records are distinguished by their Literal fields.
    """
    if value is None and types.NoneType in options:
        return None
    problems = []
    for option in options:
        if option is types.NoneType:
            continue
        try:
            return _parse(option, value, where)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError("; ".join(problems))


def _in_words(hint: Any) -> str:
    """Return the values that a field accepts, as a user writes them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list ({_in_words(arguments[0])} each)"
    if origin is dict:
        return "an object"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
