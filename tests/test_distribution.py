"""What advice to install something promises: it never fetches a stranger's package."""

import re
import shlex
from pathlib import Path

import pytest

from nsp import distribution
from nsp.distribution import DISTRIBUTION, checkout, extras, pip_install, version

ROOT = Path(__file__).parents[1]
OURS = f'[project]\nname = "{DISTRIBUTION}"\nversion = "9.9"\n'
OTHERS = '[project]\nname = "somebody-elses"\nversion = "1"\n'


def run_from(folder: Path, project: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package lie in `folder`, with a pyproject.toml beside it or not."""
    (folder / "nsp").mkdir(parents=True)
    if project is not None:
        (folder / "pyproject.toml").write_text(project)
    monkeypatch.setattr(distribution, "__file__", str(folder / "nsp/distribution.py"))


def test_no_file_names_the_package_of_somebody_else() -> None:
    files = [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml")]
    for folder in ("nsp", "export", "benchmarks", "docs", "slurm", "tests"):
        files += [f for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".md", ".sh", ".j2")]
    files += ROOT.glob("*.py")
    bare = re.compile(r"""pip3? install[^\n]*[\s'"=]nsp(?![\w/.-])|\bnsp\[[a-z]""")
    found = [f.relative_to(ROOT) for f in files if bare.search(f.read_text(encoding="utf-8"))]
    assert found == []


def test_a_checkout_is_installed_from_where_it_really_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "it's a $HOME; (1)"
    run_from(folder, OURS, monkeypatch)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setattr(distribution, "__file__", str(tmp_path / "link/nsp/distribution.py"))
    assert shlex.split(pip_install("export")) == ["pip", "install", "-e", f"{folder}[export]"]
    assert version() == "9.9"


@pytest.mark.parametrize("project", [None, OTHERS, "[project", "", "\udc80"])
def test_an_installed_package_is_asked_for_by_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: str | None
) -> None:
    """Also where packages are installed into the folder of another project."""
    run_from(tmp_path, None, monkeypatch)
    if project is not None:
        (tmp_path / "pyproject.toml").write_bytes(project.encode(errors="surrogateescape"))
    assert checkout() is None
    assert pip_install("train") == f"pip install '{DISTRIBUTION}[train]'"


def test_the_extras_are_those_of_this_project() -> None:
    assert checkout() == ROOT
    assert {"export", "train", "bench", "tensorrt-rtx", "all"} <= set(extras())
    (everything,) = extras()["all"]
    assert everything.startswith(f"{DISTRIBUTION}[export,")
