"""Constructor arguments of public code, given beside published weights that do not show them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsp.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)


def check_parts(config: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ConfigError for a configuration with none of the known parts; warn of other keys."""
    others = [key for key in config if key not in known]
    if others and not any(key in config for key in known):
        raise ConfigError(f"--config: unknown key {others[0]!r}; known: {', '.join(known)}")
    if others:
        log.warning(
            "--config: only %s are used, not %s", " and ".join(known), ", ".join(map(str, others))
        )


def arguments_of(config: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Return the arguments of one part; ConfigError unless they are an object."""
    found = config.get(part, {})
    if not isinstance(found, Mapping):
        raise ConfigError(f"--config: {part} must be an object with constructor arguments")
    return found


def renamed(
    given: Mapping[str, Any], table: Mapping[str, str | None], where: str, told: Mapping[str, Any]
) -> dict[str, Any]:
    """Return our fields for constructor arguments; None, the public default, is left out.

    `table` maps arguments to our fields, or to None where nothing depends on them. Raises
    ConfigError for an unknown argument, and for one that contradicts the tensors.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in table:
            known = ", ".join(table)
            raise ConfigError(f"--config: {where}.{name} is not an argument; known: {known}")
        field = table[name] or name
        if field in told and value != told[field]:
            raise contradiction(f"{where}.{name}", value, told[field])
        if table[name] is not None and value is not None:
            found[field] = value
    return found


def contradiction(name: str, given: Any, told: Any) -> ConfigError:
    """Return the error for an argument that the weights do not agree with."""
    return ConfigError(
        f"--config: {name}={given!r} contradicts the other values or the weights, which have "
        f"{told!r}; omit it"
    )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add to an error about tensors the file it is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
