"""Checks of numbers, flags, texts and paths, the same wherever a user gives them.

The command line, Python and JSON files may give anything: a NumPy scalar counts as its number, a
truth value is not a number, and a value too large for any computer is refused here, before it is
used. Each function returns Python's own value or raises ConfigError with what was given and what is
allowed.
"""

import difflib
import math
import numbers
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nsp.errors import ConfigError

MOST = 2**31 - 1  # the largest count: more than fits into any machine
_MAX_SHOWN = 80  # characters of a wrong value in an error
_MAX_KNOWN = 40  # names in an error


def shown(value: Any) -> str:
    """Return `value` as one short line, for an error."""
    if is_integer(value) and abs(int(value)) >= 10**_MAX_SHOWN:  # Python refuses to print long ones
        return f"an integer of {int(value).bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # an object of somebody else may raise anything
        return f"a {type(value).__name__} ({type(error).__name__})"
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ", nearest is X; known: X, Y" for an error about a name; X is absent if none is near.

    Upper case, dashes and underscores do not count.
    """
    names = list(known)
    plain = {each.lower().replace("-", "_"): each for each in names}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), plain, 1)
    more = f" and {len(names) - _MAX_KNOWN} more" if len(names) > _MAX_KNOWN else ""
    hint = f", nearest is {plain[near[0]]}" if near else ""
    return f"{hint}; known: {', '.join(names[:_MAX_KNOWN])}{more}"


def is_integer(value: Any) -> bool:
    """Return whether this is an integer of Python or NumPy, and not a truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(name: str, value: Any, *, least: int, most: int = MOST) -> int:
    """Return an integer from `least` to `most`."""
    if not is_integer(value) or int(value) < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, not {shown(value)}")
    if int(value) > most:
        raise ConfigError(f"{name} must be at most {most}, not {shown(value)}")
    return int(value)


def count(name: str, value: Any, *, most: int = MOST) -> int:
    """Return a number of things: an integer from 1 to `most`."""
    return integer(name, value, least=1, most=most)


def seed(value: Any) -> int:
    """Return a seed, in the range that NumPy's Philox generators accept."""
    if not is_integer(value) or not 0 <= int(value) < 2**64:
        raise ConfigError(f"seed={shown(value)} must be an integer between 0 and 2**64 - 1")
    return int(value)


def real(name: str, value: Any, *, least: float, most: float) -> float:
    """Return a finite number from `least` to `most`."""
    expected = f"{name} must be a number from {least:g} to {most:g}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ConfigError(f"{expected}, not {shown(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not least <= found <= most:  # also false for NaN
        raise ConfigError(f"{expected}, not {shown(value)}")
    return found


def flag(name: str, value: Any) -> bool:
    """Return a truth value: True or False, of Python or NumPy, or the integers 1 and 0."""
    scalar = type(value).__name__ in ("bool", "bool_") or is_integer(value)
    if not scalar or value not in (0, 1):
        raise ConfigError(f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def choice(name: str, value: Any, known: Iterable[str] = ()) -> str:
    """Return a name, one of `known` where any are given."""
    options = tuple(known)
    if not isinstance(value, str):
        expected = f"one of {', '.join(options)}" if options else "a text"
        raise ConfigError(f"{name} must be {expected}, not {shown(value)}")
    if options and value not in options:
        raise ConfigError(f"{name} {value!r} is unknown{nearest(value, options)}")
    return str(value)


def path(name: str, value: Any) -> Path:
    """Return a path that is possible on this system."""
    if not isinstance(value, str | os.PathLike) or isinstance(value, bytes):
        raise ConfigError(f"{name} must be a path, not {shown(value)}")
    try:
        found = Path(value)
        encoded = os.fsencode(found)
    except (TypeError, ValueError) as error:  # a lone surrogate, or a path of bytes
        raise ConfigError(
            f"{name} {shown(value)} is not a path: no file name can have its characters"
        ) from error
    if b"\0" in encoded:
        raise ConfigError(
            f"{name} {shown(value)} is not a path: no file name can have its characters"
        )
    return found
