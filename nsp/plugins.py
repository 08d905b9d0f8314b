"""Finds objects by name: built-in ones in a table, others through entry points of packages.

A built-in name is never looked up among the entry points, and wins a clash. A plugin that fails to
import, or whose package was partly removed, gives one warning and never stops another plugin.
"""

import importlib
import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from nsp.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

logger = logging.getLogger(__name__)


class Plugins:
    """One group of entry points, with a table of built-in "module:attribute" texts."""

    def __init__(self, group: str, built_in: Mapping[str, str]) -> None:
        self.group, self.built_in = group, built_in
        self._left_out: set[str] = set()  # plugins that were warned about

    def load(self, name: str) -> object | None:
        """Import and return the object called `name`; None if it is unknown or broken."""
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            found: object = getattr(importlib.import_module(module), attribute)
            return found
        entry = self._others.get(name)
        if entry is None:
            return None
        try:
            loaded: object = entry.load()
        except (Exception, SystemExit) as error:  # importing another package may raise anything
            self._leave_out(
                name,
                f"{self.group} {name!r} of package {_package(entry)} cannot be loaded and is left "
                f"out ({type(error).__name__}: {error})",
            )
            return None
        return loaded

    def names(self) -> list[str]:
        """Return all names, the built-in ones first, without plugins that were warned about."""
        return [*self.built_in, *(name for name in self._others if name not in self._left_out)]

    def usable(self, get: Callable[[str], object]) -> list[str]:
        """Return the names, without those for which `get` raises ConfigError and warns."""
        for name in self.names()[len(self.built_in) :]:
            try:
                get(name)
            except ConfigError as error:
                self._leave_out(name, f"{error}; it is left out")
        return self.names()

    def _leave_out(self, name: str, problem: str) -> None:
        """Warn about a plugin once."""
        if name not in self._left_out:
            self._left_out.add(name)
            logger.warning("%s", problem)

    @cached_property
    def _others(self) -> dict[str, "EntryPoint"]:
        from importlib.metadata import entry_points

        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            if entry.name in self.built_in:
                owner = "nsp's own"
            elif entry.name in found and found[entry.name].value != entry.value:
                owner = f"that of package {_package(found[entry.name])}"
            else:
                found[entry.name] = entry
                continue
            logger.warning(
                "%s %r of package %s is left out: the name is %s",
                self.group,
                entry.name,
                _package(entry),
                owner,
            )
        return found


def _package(entry: "EntryPoint") -> str:
    """Return the distribution an entry point comes from."""
    return entry.dist.name if entry.dist is not None else "unknown"
