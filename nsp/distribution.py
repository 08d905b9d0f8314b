"""The name of this project on the package index, and how its optional parts are installed.

The package and the command are `nsp`; on the package index that name belongs to somebody else, and
asking pip for it would install a stranger's code. So all advice to install a part of this project
is written here: with the path of the checkout that is running, otherwise with the name below.
"""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

DISTRIBUTION = "nsp-engines"
EMOJI_DISTRIBUTION = "nsp-engines-emoji"  # the embedded data set: deploy/emoji_data


def pip_install(extra: str) -> str:
    """Return the command that installs an extra of this project on this machine.

    A checkout is installed by its path, so that no package index decides what is installed; for an
    installed package, pip adds only the missing requirements.
    """
    folder = checkout()
    if folder is None:
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    return f"pip install -e {shlex.quote(f'{folder}[{extra}]')}"


def install_emoji() -> str:
    """Return the command that installs the embedded data set when it is missing."""
    folder = checkout()
    if folder is None:
        return f"pip install {EMOJI_DISTRIBUTION}"
    return f"git -C {shlex.quote(str(folder))} checkout -- nsp/data/emoji.tar"


def checkout() -> Path | None:
    """Return the real path of the checkout this package is run from; None when it is installed."""
    folder = Path(__file__).resolve().parents[1]
    return folder if _project(folder) is not None else None


def version() -> str | None:
    """Return the version of this package, None if it is unknown."""
    if (folder := checkout()) is not None and (project := _project(folder)) is not None:
        return str(project["version"])
    return installed_version(DISTRIBUTION)


def installed_version(distribution: str) -> str | None:
    """Return the installed version of a distribution, None when it is not installed."""
    from importlib import metadata  # takes 15 ms, which generating an image does not need

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def extras() -> dict[str, list[str]]:
    """Return the requirements of every extra of this project; empty if they are unknown."""
    if (folder := checkout()) is not None and (project := _project(folder)) is not None:
        return {name: list(lines) for name, lines in project["optional-dependencies"].items()}
    from importlib import metadata

    try:
        wanted = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in wanted:
        requirement, _, marker = line.partition(";")
        if extra := re.search(r"""extra == ['"](.+?)['"]""", marker):
            found.setdefault(extra[1], []).append(requirement.strip())
    return found


@cache
def _project(folder: Path) -> dict[str, Any] | None:
    """Return the [project] table of our pyproject.toml in a folder; None if it is not there."""
    if not (folder / "pyproject.toml").is_file():
        return None
    import tomllib

    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):  # not readable, or the file of another project
        return None
    return project if project.get("name") == DISTRIBUTION else None
