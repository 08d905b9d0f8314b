"""The commands of the README run as they stand there, in order, in one folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.small import new_small_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def console_commands() -> list[str]:
    """Return the `$ ...` lines of all console blocks, without their comments."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line.removeprefix("$ ").split("  #")[0].strip() for line in lines]


# What the suite itself or a fresh machine runs, and so not again in here.
OUTSIDE = ("make ", "pip install")
# Training at the size shown takes minutes; the same command runs with the smallest preset.
SMALLER = {"--preset quick": "--preset smoke"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project's scripts and a finished training run of a small model."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "train.py", folder)
    new_small_checkpoint(folder / "runs" / "small" / "checkpoint")
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    for written, smaller in SMALLER.items():
        command = command.replace(written, smaller)
    program, *arguments = shlex.split(command)
    interpreter = (
        [sys.executable] if program == "python" else [str(Path(sys.executable).parent / program)]
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        [*interpreter, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_console_commands_work(workspace: Path) -> None:
    commands = [c for c in console_commands() if not c.startswith(OUTSIDE)]
    assert {"nsp", "python"} == {c.split()[0] for c in commands}
    for command in commands:
        result = run(command, workspace)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert (workspace / "outputs" / "contact_sheet.png").is_file()


def test_python_example_works(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it saves a picture
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = example.replace('"engines/"', repr(str(tiny_checkpoint)))
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["preview"].shape == (1, 3, 16, 16)


def test_outside_commands_are_targets_and_extras_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in console_commands():
        if command.startswith("make "):
            assert f"\n{command.split()[1]}:" in makefile
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r'"\.\[([a-z,-]+)\]"', README):
        assert all(f"\n{extra} = [" in project for extra in extras.split(","))


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_links_lead_to_files(link: str) -> None:
    assert (ROOT / link).exists(), link
