"""Families by name: built-in ones from a table, others through entry points.

Another package declares its family like this, and nothing here changes:

    [project.entry-points."nsp.families"]
    my_family = "my_package:MyFamily"
"""

import dataclasses
import typing
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from nsp.errors import ConfigError
from nsp.plugins import Plugins

if TYPE_CHECKING:
    from nsp.family.contract import AnyFamily

# Built-in families need no entry points: reading these takes 15 to 25 ms, and in a checkout they
# may be out of date.
BUILT_IN: Mapping[str, str] = {
    "var": "nsp.families.var:Var",
    "next_scale": "nsp.families.next_scale:NextScale",
    "next_patch": "nsp.families.next_patch:NextPatch",
    "inl_diffusion": "nsp.families.inl_diffusion:InlDiffusion",
    "latent_gpt": "nsp.families.latent_gpt:LatentGpt",
}
_PLUGINS = Plugins("nsp.families", BUILT_IN)


@cache
def family(name: str) -> "AnyFamily":
    """Return the family called `name`; raise ConfigError naming the known ones."""
    found = _PLUGINS.load(name)
    if found is None:
        raise ConfigError(f"unknown family {name!r}; known: {', '.join(family_names())}")
    return _checked(name, found)


def _checked(name: str, found: object) -> "AnyFamily":
    """Return an instance of the family found under a name; ConfigError if it is not a `Family`."""
    from nsp.family.contract import API, Family  # needs numpy, which help texts do not need

    if not (isinstance(found, type) and issubclass(found, Family)):
        raise ConfigError(f"family {name!r}: {found!r} is not a subclass of nsp's Family")
    if found.api != API:
        raise ConfigError(
            f"family {name!r} is written for version {found.api} of the contract, but this nsp has "
            f"{API}; install a matching version of its package"
        )
    try:
        made: AnyFamily = found()
        owned = made.name, made.config, made.sampling
        typing.get_type_hints(made.sampling)
        dataclasses.fields(made.sampling)
    except Exception as error:  # abstract methods, attributes without a value, or its own code
        raise ConfigError(
            f"family {name!r} cannot be used ({type(error).__name__}: {error})"
        ) from error
    if owned[0] != name:
        raise ConfigError(f"family {name!r} calls itself {owned[0]!r}: both must be the same")
    return made


def family_names() -> list[str]:
    """Return the names of all families: the built-in ones, then those of other packages.

    One that cannot be used is left out with a warning.
    """
    return _PLUGINS.usable(family)
