"""Named training runs: the recipes of all families."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nsp.errors import ConfigError
from nsp.family import signature
from nsp.family.recipe import RunConfig
from nsp.family.registry import BUILT_IN, family, family_names
from nsp.family.signature import Parameter
from nsp.values import nearest, real

logger = logging.getLogger(__name__)

# The recipes of a command line without a preset, a file or a stopped run: from new weights, and
# for own pictures.
DEFAULT, DEFAULT_FOR_DATA = "emoji", "finetune"


@dataclass(frozen=True)
class Recipe:
    """A function beside its family that returns a run; its signature is the command line."""

    name: str
    family: str
    make: Callable[..., RunConfig]

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its options."""
        return signature.parameters(self.make)

    @property
    def output_dir(self) -> Path | None:
        """The run folder if none is given; None: runs/NAME."""
        return signature.output_dir(self.make)

    @property
    def planned_as(self) -> Mapping[str, str] | None:
        """The options that `nsp plan` gives it; None: it cannot be planned without its files."""
        return signature.planned_as(self.make)

    def run(self, **options: object) -> RunConfig:
        """Return the run; ConfigError for an option that is unknown, missing or out of range."""
        check_options(f"preset {self.name}", self.parameters, options)
        return self.make(**options)


def check_options(owner: str, known: tuple[Parameter, ...], options: Mapping[str, object]) -> None:
    """Raise ConfigError for an option that is unknown, missing or out of its range."""
    named = {each.name: each for each in known}
    if unknown := [name for name in options if name not in named]:
        hint = nearest(option(unknown[0]), map(option, named)) if named else ""
        raise ConfigError(f"{option(unknown[0])} is not an option of {owner}{hint}")
    if missing := [each for each in known if each.is_required and each.name not in options]:
        raise ConfigError(f"{owner} needs {option(missing[0].name)}: {missing[0].help}")
    for name, value in options.items():
        limits = named[name].range
        if isinstance(value, int | float) and limits != signature.Range():
            least = -float("inf") if limits.least is None else limits.least
            most = float("inf") if limits.most is None else limits.most
            found = real(option(name), value, least=least, most=most)
            if limits.is_open and found in (least, most):
                raise ConfigError(
                    f"{option(name)} must be a number between {least:g} and {most:g}, not {value}"
                )


def option(name: str) -> str:
    """Return the option of a keyword as it is typed."""
    return f"--{name.replace('_', '-')}"


def recipes(*, built_in_only: bool = False) -> dict[str, Recipe]:
    """Return every family's recipes by name; the first family that has a name keeps it."""
    found: dict[str, Recipe] = {}
    for owner in BUILT_IN if built_in_only else family_names():
        for name, make in _recipes_of(owner).items():
            if found.setdefault(name, Recipe(name, owner, make)).family != owner:
                logger.warning("recipe %r of family %s is left out: the name is taken", name, owner)
    return found


def presets_with(name: str, owner: str | None = None) -> list[str]:
    """Return the names of the recipes that have the option, of one family or of all built in."""
    found = recipes(built_in_only=owner is None)
    return [
        each.name
        for each in found.values()
        if owner in (None, each.family) and name in (own.name for own in each.parameters)
    ]


def _recipes_of(name: str) -> Mapping[str, Callable[..., RunConfig]]:
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


def recipe(name: str) -> Recipe:
    """Return the recipe called `name`, with dashes or underscores; ConfigError names the nearest.

    Families of other packages are loaded only if no built-in one has it.
    """
    for spelled in (name, name.replace("-", "_")):
        if found := recipes(built_in_only=True).get(spelled):
            return found
    known = recipes()
    for spelled in (name, name.replace("-", "_")):
        if spelled in known:
            return known[spelled]
    raise ConfigError(f"unknown preset {name!r}{nearest(name, known)}")


def default_recipe(options: Mapping[str, object]) -> str:
    """Return the recipe of a command line without a preset.

    Own pictures finetune the bundled model, unless a model of another size or with another text
    encoder is asked for.
    """
    is_own = options.get("data") not in (None, DEFAULT)
    is_new = any(options.get(name) is not None for name in ("size", "text_encoder"))
    return DEFAULT_FOR_DATA if is_own and not is_new else DEFAULT


def preset(name: str, **options: object) -> RunConfig:
    """Return the run of the recipe called `name`."""
    return recipe(name).run(**options)


def check_model(run: RunConfig) -> None:
    """Raise ConfigError for a model or sampling settings that the run's family does not have."""
    owner = family(run.family)
    owner.config.from_dict(run.model)
    owner.sampling.from_dict(run.sampling)
