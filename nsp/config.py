"""Frozen configuration records with an exact round trip through plain dictionaries."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from nsp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configuration records: `to_dict` and `from_dict` are inverses."""

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dictionaries, lists, numbers and strings (JSON-ready)."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the record described by `values`.

        Raises ConfigError naming a key that is unknown, missing or mistyped.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__}: expected a JSON object, got {values!r}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ConfigError(
                f"{cls.__name__}: unknown key {unknown[0]!r}; known: {', '.join(fields)}"
            )
        hints = typing.get_type_hints(cls)
        parsed = {
            name: _parse(hints[name], value, f"{cls.__name__}.{name}")
            for name, value in values.items()
        }
        try:
            return cls(**parsed)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error


def _plain(value: Any) -> Any:
    """Return `value` with records as dictionaries and tuples as lists."""
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
    if origin in (types.UnionType, typing.Union):
        return _parse_union(arguments, value, where)
    if isinstance(hint, type) and issubclass(hint, Config):
        return hint.from_dict(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_parse(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if origin is typing.Literal:
        accepted = value in arguments
    elif origin in (dict, tuple):
        accepted = False
    elif hint is float:
        accepted = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        accepted = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not accepted:
        raise ConfigError(f"{where}: {value!r} is not allowed; expected {hint}")
    return float(value) if hint is float else value


def _parse_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return `value` as the first option that takes it.

    Records are told apart by their Literal fields.
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
    raise ConfigError(f"{where}: " + "; ".join(problems))
