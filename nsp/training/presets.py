"""Named training runs: the recipes of all families."""

from collections.abc import Callable, Mapping
from typing import Any

from nsp.errors import ConfigError
from nsp.family.recipe import RunConfig
from nsp.family.registry import family, family_names


def presets() -> dict[str, Callable[[], RunConfig]]:
    """Return every family's recipes by name."""
    return {name: make for each in family_names() for name, make in family(each).recipes.items()}


def preset(name: str) -> RunConfig:
    """Return the named run; raise ConfigError naming the known ones."""
    known = presets()
    if name not in known:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(known)}")
    return known[name]()


def option_defaults(name: str) -> Mapping[str, Any]:
    """Return a preset's own defaults for options of the command line."""
    for each in family_names():
        if name in (options := family(each).recipe_options):
            return options[name]
    return {}
