"""Named training runs: the recipes of all families."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from nsp.errors import ConfigError
from nsp.family.recipe import RunConfig
from nsp.family.registry import BUILT_IN, family, family_names

logger = logging.getLogger(__name__)


def presets() -> dict[str, Callable[[], RunConfig]]:
    """Return every family's recipes by name; the first family that has a name keeps it."""
    found: dict[str, Callable[[], RunConfig]] = {}
    for each in family_names():
        for name, make in _recipes_of(each).items():
            if found.setdefault(name, make) is not make:
                logger.warning("recipe %r of family %s is left out: the name is taken", name, each)
    return found


def _recipes_of(name: str) -> Mapping[str, Callable[[], RunConfig]]:
    """Return a family's recipes; none, with a warning, of a plugin where they fail."""
    try:
        return family(name).recipes
    except Exception as error:  # the code of another package may raise anything
        if name in BUILT_IN:
            raise
        logger.warning(
            "family %s has no usable recipes (%s: %s)", name, type(error).__name__, error
        )
        return {}


def preset(name: str) -> RunConfig:
    """Return the named run; raise ConfigError naming the known ones."""
    known = presets()
    if name not in known:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(known)}")
    return known[name]()


def option_defaults(name: str) -> Mapping[str, Any]:
    """Return a preset's own defaults for options of the command line."""
    owner = next((each for each in family_names() if name in _recipes_of(each)), None)
    return {} if owner is None else family(owner).recipe_options.get(name, {})
