"""The JSON Schema of a run's configuration, for editors: made from the records' fields."""

import dataclasses
import types
import typing
from typing import Any

from nsp.config import Config
from nsp.family.recipe import PhaseConfig, RunConfig

_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def run_schema() -> dict[str, Any]:
    """Return the schema of the files that `--config` takes, in JSON Schema 2020-12."""
    records: dict[str, dict[str, Any]] = {}
    _record(RunConfig, records)
    top = records.pop(RunConfig.__name__)
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A training run"}
    return {**about, **top, "$defs": records}


def _record(record: type[Config], records: dict[str, dict[str, Any]]) -> None:
    """Add the schema of a record, and of those inside it, to `records`."""
    hints = typing.get_type_hints(record)
    fields = dataclasses.fields(record)
    made = records[record.__name__] = {"type": "object"}
    made["description"] = (record.__doc__ or "").strip().splitlines()[0]
    properties = {each.name: _type(hints[each.name], records) for each in fields}
    for each in fields:
        if each.default is not dataclasses.MISSING and not isinstance(each.default, Config):
            default = each.default
            properties[each.name]["default"] = (
                list(default) if isinstance(default, tuple) else default
            )
    unset = (dataclasses.MISSING, dataclasses.MISSING)
    required = [each.name for each in fields if (each.default, each.default_factory) == unset]
    if record is PhaseConfig:  # its length is one of two keys
        properties["steps"] = {"type": "integer", "minimum": 1}
        properties["epochs"] = {"type": "integer", "minimum": 1}
        required.remove("steps")
        made["oneOf"] = [{"required": ["steps"]}, {"required": ["epochs"]}]
    made |= {"properties": properties, "required": required, "additionalProperties": False}


def _type(hint: Any, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a value of this type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_type(each, records) for each in arguments]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _type(arguments[0], records)}
    if origin is dict:
        return {"type": "object"}
    if hint is types.NoneType:
        return {"type": "null"}
    if isinstance(hint, type) and issubclass(hint, Config):
        if hint.__name__ not in records:
            _record(hint, records)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    return {"type": _NAMES[hint]} if hint in _NAMES else {}
