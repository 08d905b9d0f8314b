"""Folders and programs of a user's own change nothing, whatever they are called.

The checkout has `export`, `benchmarks`, `cli` and `train` at its top, but they are imported as
parts of `nsp` alone: a user's modules of these names, in the current folder or on PYTHONPATH, are
theirs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.small import new_small_checkpoint

ROOT = Path(__file__).parents[1]
NAMES = ("cli.py", "train.py", "export/__init__.py", "benchmarks/__init__.py")


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose modules end the process that imports them."""
    folder = tmp_path_factory.mktemp("users")
    for name in NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"import os\nprint('imported {name}', flush=True)\nos._exit(99)")
    return folder


def run(*words: object, folder: Path, path: Path) -> str:
    """Return what a process in `folder` prints, with `path` before the checkout on PYTHONPATH."""
    paths = os.pathsep.join((str(path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("program", [("-m", "nsp"), (ROOT / "cli.py",), (ROOT / "train.py",)])
def test_programs_begin_in_a_folder_with_names_of_ours(
    program: tuple[object, ...], users_folder: Path
) -> None:
    assert "Usage: " in run(*program, "--help", folder=users_folder, path=users_folder)


def test_verbs_import_nothing_of_the_users(users_folder: Path, tmp_path: Path) -> None:
    def nsp(*words: object) -> str:
        return run("-m", "nsp", *words, folder=users_folder, path=users_folder)

    engines, pictures = tmp_path / "engines", tmp_path / "pictures"
    model = ("--checkpoint", new_small_checkpoint(tmp_path / "model", num_classes=3))
    nsp("export", *model, "--engine-dir", engines, "--target", "onnxruntime")
    nsp("generate", "--engine-dir", engines, "--class-id", 1, "--output-dir", pictures)
    nsp("verify", engines, *model)
    nsp("inspect", engines)
    assert '"backends"' in nsp("doctor", "--json")
    assert list(pictures.glob("*.png"))


def test_child_processes_import_nothing_of_the_users(users_folder: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "from nsp.child import environment\n"
        "child = [sys.executable, '-P', '-m', 'nsp.cli', 'doctor', '--json']\n"
        "sys.exit(subprocess.run(child, env=environment()).returncode)"
    )
    assert '"backends"' in run("-c", code, folder=users_folder, path=users_folder)


@pytest.mark.parametrize(
    "words",
    [
        ("cli.py", "doctor"),
        ("cli.py", "inspect", "nsp/demo"),
        ("cli.py", "export", "--dry-run", "--checkpoint", "nsp/demo"),
        ("cli.py", "bench", "--help"),
        ("train.py", "--config", "none.json"),
    ],
)
def test_a_checkout_imports_its_folders_under_one_name(words: tuple[str, ...]) -> None:
    """Each of them twice, as `export` and as `nsp.export`, would be two of every class."""
    code = (
        "import runpy, sys\n"
        "program, *words = sys.argv[1:]\n"
        "sys.argv = [program, *words]\n"
        "try: runpy.run_path(program, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('found:', *{'cli', 'train', 'export', 'benchmarks'} & sys.modules.keys())"
    )
    assert run("-c", code, *words, folder=ROOT, path=ROOT).splitlines()[-1].split() == ["found:"]
