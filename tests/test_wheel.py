"""A wheel built from the checkout installs and runs outside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def installed(project: Path, folder: Path) -> Path:
    """Build a wheel of a project in `folder`; return the folder it alone is installed in."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", str(project), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    # A build/ that an earlier build left in the checkout would go into the wheel.
    (folder / "build.cfg").write_text(f"[build]\nbuild_base = {folder / 'build'}\n")
    environment = {**os.environ, "DIST_EXTRA_CONFIG": str(folder / "build.cfg")}
    subprocess.run(build, check=True, cwd=folder, env=environment)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else of the project."""
    return installed(ROOT, tmp_path_factory.mktemp("wheel"))


def run(site: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )


def test_help_works_outside_the_checkout(site: Path) -> None:
    code = "from nsp import cli; assert 'site' in cli.__file__, cli.__file__; cli.main()"
    result = run(site, code, "--help")
    assert result.returncode == 0, result.stderr
    for verb in ("export", "generate", "bench", "verify", "inspect", "doctor", "convert"):
        assert verb in result.stdout


def test_everything_a_run_needs_is_in_the_wheel(site: Path) -> None:
    code = (
        "import nsp, nsp.export, nsp.benchmarks, nsp.train\n"
        "from pathlib import Path\n"
        "assert Path(nsp.benchmarks.__file__).parent.joinpath('render/report.html.j2').is_file()\n"
        "packages = (nsp, nsp.export, nsp.benchmarks, nsp.train)\n"
        "assert all(str(m.__file__).startswith(sys.argv[1]) for m in packages)"
    )
    result = run(site, "import sys\n" + code, str(site))
    assert result.returncode == 0, result.stderr
    assert (site / "nsp" / "py.typed").is_file()


def test_the_embedded_data_set_is_a_distribution_of_its_own(site: Path, tmp_path: Path) -> None:
    code = "from nsp.data.sources import emoji_tar; print(emoji_tar())"
    done = run(site, code)
    assert done.returncode == 1
    assert done.stderr.endswith("'emoji' is not installed; run: pip install nsp-engines-emoji\n")
    data = installed(ROOT / "deploy/emoji_data", tmp_path)
    found = Path(run(site, f"import sys; sys.path.append({str(data)!r})\n{code}").stdout.strip())
    assert found == data / "nsp_emoji_data/emoji.tar"
    assert not found.is_symlink()
    assert found.read_bytes() == (ROOT / "nsp/data/emoji.tar").read_bytes()
    assert "SIL OPEN FONT LICENSE" in next(data.rglob("NOTICE.md")).read_text(encoding="utf-8")


def test_the_wheel_holds_no_data_set(site: Path) -> None:
    assert list(site.rglob("*.tar")) == []


def test_the_wheel_installs_one_name_and_no_links(site: Path) -> None:
    tops = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert tops - {"bin", "__pycache__"} == {"nsp"}
    assert not [path for path in site.rglob("*") if path.is_symlink()]


def test_an_installed_package_names_the_distribution_it_came_in(site: Path) -> None:
    code = (
        "from nsp.distribution import version\n"
        "from nsp.console.doctor import examine\n"
        "from nsp.errors import MissingExtraError\n"
        "print(MissingExtraError('torch', 'export'), version(), 'cli')\n"
        "print({extra['name'] for extra in examine()['extras']} >= {'export', 'train', 'dev'})"
    )
    result = run(site, code)
    assert result.stdout.splitlines() == [
        "torch is not installed; run: pip install 'nsp-engines[export]' 0.1.0 cli",
        "True",
    ], result.stderr
