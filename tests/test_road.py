"""How many of our modules a prompt passes on its way to a picture, and train.py to its first step.

Each is a file to open for who follows that road. The bounds are what was measured: a road may
become shorter, and its bound with it; one that becomes longer says why here.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from nsp.child import environment
from nsp.cli import main

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests/past/before_orders/checkpoint"  # the smallest that has all parts
# At e454fbf, before families were typed and pipelines ran orders: 30, 17, 43 and 70.
# Since the first count: tokenizers of any kind, and batches padded to built sizes, a module each;
# before the first step also what the run lacks (training/needs.py), and a count of operations with
# attention on CPUs (artifacts/counting.py). 80 became 81 with the log handler of the other
# commands, and 84 when training/whole_run.py was divided: the start, a phase and what does not fit
# have a file each. Options have a file of their own beside that of commands, one more on each road.
# With raster families, which share them: how codes are drawn has a file apart from `var`, one more
# on each road, and training has VQGAN's blocks and codes as data; a run looks for its recipe in
# every family.
LOADING, CALL, GENERATE, FIRST_STEP = 37, 22, 52, 92


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's engines for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("road") / "engines"
    arguments = ["export", "--checkpoint", MODEL, "--engine-dir", folder, "--target", "onnxruntime"]
    exported = CliRunner().invoke(main, [str(each) for each in arguments])
    assert exported.exit_code == 0, exported.output
    return folder


def road(name: str, *folders: Path) -> dict[str, list[str]]:
    """Return the modules that a fresh process passes."""
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "tests/road.py"), name, *map(str, folders)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(passed: Sequence[str], most: int) -> None:
    """Fail with the names where a road is longer than it was."""
    assert len(passed) <= most, f"{len(passed)} modules, at most {most}: {', '.join(passed)}"


def test_a_prompt_passes_no_more_modules_than_measured_in_python(engines: Path) -> None:
    passed = road("call", engines)
    check(passed["loading"], LOADING)
    check(passed["call"], CALL)
    assert {"nsp.pipeline.pipeline", "nsp.families.var.loop"} <= set(passed["call"])


def test_a_prompt_passes_no_more_modules_than_measured_on_the_command_line(
    engines: Path, tmp_path: Path
) -> None:
    found = road("generate", engines, tmp_path)
    check(found["generate"], GENERATE)
    assert {"nsp.cli", "nsp.console.gallery", "nsp.families.var.loop"} <= set(found["generate"])
    # Each takes milliseconds of a start, and is of other families, other models, other pictures.
    others = {"nsp.families.next_scale", "nsp.artifacts.checkpoint", "nsp.data.pictures"}
    assert others.isdisjoint(found["imported"])


def test_training_passes_no_more_modules_than_measured_to_its_first_step(tmp_path: Path) -> None:
    passed = road("train", tmp_path / "run")["first step"]
    check(passed, FIRST_STEP)
    assert {"nsp.training.trainer", "nsp.families.var.tokenizer_objective"} <= set(passed)
