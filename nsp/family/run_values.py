"""Single values of a run by their place, such as `predictor.optimizer.lr` or `model.vae.dropout`.

The first name is a phase or a field of RunConfig; `phases.*` are all phases. The records of the
configuration decide which names exist and what type a value has.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from nsp.config import Config
from nsp.errors import ConfigError
from nsp.family.recipe import PhaseConfig, RunConfig
from nsp.family.recipes import check_model
from nsp.family.registry import family
from nsp.values import nearest

Record: TypeAlias = type[Config] | None  # None: a dictionary without declared keys

_WORDS = {"true": True, "yes": True, "false": False, "no": False, "none": None, "null": None}


def with_texts(run: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """Return the run with values from texts "PLACE=VALUE", as `--set` takes them.

    Raises ConfigError for a name that does not exist, with the nearest one, and for a wrong value.
    """
    values = run.to_dict()
    for text in assignments:
        place, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: write it as PLACE=VALUE, such as seed=3")
        for record, found, name in _places(run, values, place.strip()):
            _assign(record, found, name, _typed(record, name, value.strip()))
    return _checked(run, values)


def with_values(run: RunConfig, assignments: Iterable[tuple[str, Any]]) -> RunConfig:
    """Return the run with values of their own type at these places; ConfigError for wrong ones."""
    values = run.to_dict()
    for place, value in assignments:
        for record, found, name in _places(run, values, place):
            _assign(record, found, name, value)
    return _checked(run, values)


def _checked(run: RunConfig, values: dict[str, Any]) -> RunConfig:
    """Return the run of these values; its model and sampling settings must fit its family."""
    changed = RunConfig.from_dict(values)
    if (changed.model, changed.sampling) != (run.model, run.sampling):
        check_model(changed)
    return changed


def _places(
    run: RunConfig, values: dict[str, Any], place: str
) -> Iterator[tuple[Record, dict[str, Any], str]]:
    """Yield for every value at a place its record's type, its dictionary and its own name."""
    names = place.split(".")
    phases = {phase["name"]: phase for phase in values["phases"]}
    if names[0] == "phases" and len(names) > 2:
        names = names[1:]
        numbered = {str(index): phase for index, phase in enumerate(values["phases"])}
        phases |= numbered
        chosen = list(values["phases"]) if names[0] == "*" else [phases.get(names[0])]
    elif names[0] in phases:
        chosen = [phases[names[0]]]
    else:
        known = [*_names(RunConfig), *phases]
        if names[0] not in known or len(names) == 0:
            raise ConfigError(f"--set {place}: {names[0]!r} is unknown{nearest(names[0], known)}")
        owner = family(run.family)
        typed: dict[str, Record] = {"model": owner.config, "sampling": owner.sampling}
        yield _walk(place, RunConfig, values, names, typed)
        return
    for phase in chosen:
        if phase is None or len(names) < 2:
            raise ConfigError(f"--set {place}: {names[0]!r} is unknown{nearest(names[0], phases)}")
        yield _walk(place, PhaseConfig, phase, names[1:], {})


def _walk(
    place: str,
    record: Record,
    values: dict[str, Any],
    names: list[str],
    typed: dict[str, Record],
) -> tuple[Record, dict[str, Any], str]:
    """Return the type, the dictionary and the name of the value that `names` lead to."""
    for depth, name in enumerate(names):
        if record is not None and name not in (known := _names(record)):
            raise ConfigError(f"--set {place}: {name!r} is unknown{nearest(name, known)}")
        if depth == len(names) - 1:
            break
        inner = values.get(name)
        record = typed.get(name) if depth == 0 and name in typed else _record(record, name, inner)
        if inner is None and record is not None:
            inner = values[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {place}: {name} is one value and has no {names[depth + 1]!r}")
        values = inner
    return record, values, names[-1]


def _names(record: type[Config]) -> list[str]:
    names = [each.name for each in dataclasses.fields(record)]
    return [*names, "epochs"] if issubclass(record, PhaseConfig) else names


def _options(record: type[Config], name: str) -> list[Any]:
    """Return the types that a field accepts."""
    hint = typing.get_type_hints(record).get(name, int)  # `epochs` of a phase is a number
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return list(typing.get_args(hint))
    return [hint]


def _record(record: Record, name: str, value: Any) -> Record:
    """Return the record of a field; of several, the one that its value is."""
    if record is None:
        return None
    found = [each for each in _options(record, name) if isinstance(each, type)]
    records = [each for each in found if issubclass(each, Config)]
    for each in records[:-1]:
        try:
            each.from_dict(value)
        except ConfigError:
            continue
        return each
    return records[-1] if records else None


def _typed(record: Record, name: str, text: str) -> Any:
    """Return the value that a text means for a field: a text, or a number, list or object."""
    options = [Any] if record is None else _options(record, name)
    if text.lower() in ("none", "null") and types.NoneType in options:
        return None
    literals = [value for each in options for value in typing.get_args(each)]
    if str in options or text in literals:
        return text
    is_list = any(typing.get_origin(each) is tuple for each in options)
    try:
        value = json.loads(text)
    except ValueError:
        if is_list:
            return [_typed(None, name, item.strip()) for item in text.split(",") if item.strip()]
        value = _WORDS.get(text.lower(), text)
    return [value] if is_list and not isinstance(value, list) else value


def _assign(record: Record, values: dict[str, Any], name: str, value: Any) -> None:
    """Put a value in its place; a phase has one of `steps` and `epochs`."""
    if record is PhaseConfig and name in ("steps", "epochs"):
        values.pop("epochs" if name == "steps" else "steps", None)
    values[name] = value
