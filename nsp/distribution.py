"""What this project is called where packages are installed, and how more of it is installed.

The package and the command are `nsp`; on the package index that name belongs to somebody else, and
asking pip for it would install a stranger's code. So every advice to install something of this
project is made here: by the path of the checkout that is running, else by the name below.
"""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

DISTRIBUTION = "nsp-engines"
EMOJI_DISTRIBUTION = "nsp-engines-emoji"  # the embedded data set: deploy/emoji_data


def pip_install(extra: str) -> str:
    """Return the command that installs an extra of this project, as it is to be typed here.

    From a checkout that is the checkout itself, wherever it lies, so that no index decides what is
    installed; from an installed package pip adds what the extra lacks to what is there.
    """
    folder = checkout()
    if folder is None:
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    return f"pip install -e {shlex.quote(f'{folder}[{extra}]')}"


def install_emoji() -> str:
    """Return the command that brings the embedded data set here, where it is absent."""
    folder = checkout()
    if folder is None:
        return f"pip install {EMOJI_DISTRIBUTION}"
    return f"git -C {shlex.quote(str(folder))} checkout -- nsp/data/emoji.tar"


def checkout() -> Path | None:
    """Return the real path of the checkout this package is run from; None when it is installed."""
    folder = Path(__file__).resolve().parents[1]
    return folder if _project(folder) is not None else None


def version() -> str | None:
    """Return the version of this package, None where nothing tells it."""
    if (folder := checkout()) is not None and (project := _project(folder)) is not None:
        return str(project["version"])
    return installed_version(DISTRIBUTION)


def installed_version(distribution: str) -> str | None:
    """Return the version pip has on record for a distribution, None when it is not installed."""
    from importlib import metadata  # 15 ms that generating an image need not spend

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def extras() -> dict[str, list[str]]:
    """Return the requirements of every extra of this project; none where nothing tells them."""
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
    """Return the [project] table of our pyproject.toml in a folder; None where there is none."""
    if not (folder / "pyproject.toml").is_file():
        return None
    import tomllib

    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):  # not readable, or of something else
        return None
    return project if project.get("name") == DISTRIBUTION else None
