"""A run's configuration as a YAML or JSON file."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from nsp.console.common_options import read_json
from nsp.errors import ConfigError
from nsp.family.recipe import RunConfig

_YAML = (".yaml", ".yml")
_MAX_BYTES = 8 << 20
# YAML 1.1 reads 1e-3, which has no point, as a text.
_FLOAT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
_FLOAT_TAG = "tag:yaml.org,2002:float"


def read_run(path: Path) -> RunConfig:
    """Return the run in a file; ConfigError for a file that does not have one."""
    return RunConfig.from_dict(run_values(path))


def run_values(path: Path) -> dict[str, Any]:
    """Return the dictionary in a YAML or JSON file; ConfigError when it has something else."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; give the YAML or JSON file of a run")
    if path.suffix.lower() not in _YAML:
        found = read_json(path)
        json.loads(path.read_bytes(), object_pairs_hook=partial(_refuse_repeated_pair, path))
        return found
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES >> 20} MiB, so it is not a run")
    try:
        text = path.read_bytes().decode("utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ConfigError(f"{path} has an alias (*name); write its value instead")
        loader = yaml.SafeLoader(text)
        _refuse_repeated(path, yaml.compose(text, yaml.SafeLoader))
        known = loader.yaml_implicit_resolvers
        number = (_FLOAT_TAG, _FLOAT)
        loader.yaml_implicit_resolvers = known | {
            first: [*known.get(first, []), number] for first in "+-0123456789"
        }
        found = loader.get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a YAML file: {reason}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} does not contain the fields of a run")
    return found


def _refuse_repeated_pair(path: Path, pairs: list[tuple[str, object]]) -> None:
    """Raise ConfigError for a key that stands twice in an object: JSON would take the last one."""
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"{path}: {twice[0]!r} is there twice in one place; remove one")


def _refuse_repeated(path: Path, node: yaml.Node | None) -> None:
    """Raise ConfigError for a key that stands twice in one place: YAML would take the last one."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the constructor refuses it
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"{path}, line {line}: {key.value!r} is there twice; remove one")
            seen.add(key.value)
            _refuse_repeated(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated(path, value)


def as_yaml(run: RunConfig) -> str:
    """Return a run as YAML, which `read_run` reads again."""
    text: str = yaml.safe_dump(run.to_dict(), sort_keys=False, allow_unicode=True)
    return text
