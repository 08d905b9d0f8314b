"""A family in a package of its own, examples/new_family: installed beside nsp, then every verb.

No line of nsp names it; it is found by its entry point alone.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nsp.data.image_files import read_metadata
from nsp.testing import CHECKS
from tests.test_plugins import BACKEND, BACKEND_GROUP, install

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "new_family"
MOST_LINES = 250
RUN, ENGINES = "runs/raster", "engines/raster"
MOST_RECORDED = 50_000  # bytes: of 256 equal calls two are kept


@dataclass(frozen=True)
class Workplace:
    """A working folder whose programs find the installed package."""

    folder: Path
    site: Path

    def run(self, *command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Return what a Python program of the checkout did; it must end with `code`."""
        found = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.site)])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == code, found.stderr + found.stdout
        return found

    def nsp(self, *command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Return what a verb did."""
        return self.run("-m", "nsp", *command, code=code)

    def picture(self, name: str, *options: object) -> Path:
        """Return the first of the pictures that `nsp generate` made."""
        source = () if "--checkpoint" in options else ("--engine-dir", ENGINES)
        self.nsp("generate", *source, *options, "--output-dir", name)
        return self.folder / name / "000_image_seed0.png"


def commands(readme: Path) -> dict[str, list[str]]:
    """Return the arguments of the shell commands that a README has about the example, by verb."""
    blocks = re.findall(r"```sh\n(.*?)```", readme.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "new_family" in block)
    words = [shlex.split(line) for line in block.splitlines()]
    return {verb: rest for _, verb, *rest in words}


WRITTEN = commands(EXAMPLE / "README.md")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    root = tmp_path_factory.mktemp("family")
    work = Workplace(root / "work", root / "site")
    work.folder.mkdir()
    shutil.copytree(EXAMPLE, root / "copy")
    assert WRITTEN["install"] == ["--no-deps", "./examples/new_family"]
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--target", work.site)
    work.run("-m", "pip", "install", *options, root / "copy")
    return work


@pytest.fixture(scope="module")
def trained(installed: Workplace) -> Workplace:
    smaller = ["raster_smoke" if word == "raster" else word for word in WRITTEN["train.py"]]
    installed.run(ROOT / "train.py", *smaller)
    return installed


@pytest.fixture(scope="module")
def exported(trained: Workplace) -> Workplace:
    precisions = ("--fp32", "--fp16", "--target", "onnxruntime")
    found = trained.nsp("export", *WRITTEN["export"], *precisions)
    assert found.stdout.splitlines()[-1] == f"next: nsp generate --engine-dir {ENGINES}"
    return trained


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_example_can_be_read_in_minutes_and_no_line_of_nsp_names_it() -> None:
    written = [path.read_text() for path in sorted(EXAMPLE.rglob("*.py"))]
    assert sum(text.count("\n") for text in written) <= MOST_LINES
    names = re.compile(r"raster_family|raster_smoke|ink_bias|['\"]raster['\"]")
    product = [*(ROOT / "nsp").rglob("*.py"), *(ROOT / "export").rglob("*.py")]
    product += [*(ROOT / "benchmarks").rglob("*.py"), ROOT / "cli.py", ROOT / "train.py"]
    assert [path for path in product if names.search(path.read_text())] == []


def test_the_commands_of_the_readmes_are_alike_and_run(exported: Workplace) -> None:
    front = commands(ROOT / "README.md")
    assert all(front[verb] == WRITTEN[verb] for verb in ("install", "train.py"))
    made = [exported.nsp("generate", *each["generate"], "--json") for each in (WRITTEN, front)]
    pictures = [json.loads(found.stdout)["images"] for found in made]
    assert [len(images) for images in pictures] == [16, 16]


def test_its_own_setting_is_an_option_and_named_in_the_help(installed: Workplace) -> None:
    text = installed.nsp("generate", "--help").stdout
    groups = dict(re.findall(r"\nSettings of ([\w ]+):\n(.*?)\n(?=\n)", text, re.DOTALL))
    assert re.search(r"--ink-bias FLOAT\s+Above 0 draws darker, below lighter\.", groups["raster"])
    (shared,) = (owners for owners, group in groups.items() if "--temperature FLOAT " in group)
    assert {"var", "raster"} < set(shared.split())


def test_its_recipes_option_is_one_of_the_command_line(installed: Workplace) -> None:
    train = (ROOT / "train.py", "--preset", "raster")
    shown = installed.run(*train, "--help").stdout
    assert re.search(r"--width INTEGER +Channels of the network\. +\[default: 48\]", shown)
    assert "\n  width: 5\n" in installed.run(*train, "--width", 5, "--print-config").stdout


def test_it_passes_the_conformance_suite(installed: Workplace) -> None:
    lines = installed.run("-m", "nsp.testing", "raster").stdout.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["passed"] * len(CHECKS)


def test_two_steps_of_training_leave_a_checkpoint_and_samples(trained: Workplace) -> None:
    config = json.loads((trained.folder / f"{RUN}/checkpoint/config.json").read_text())
    assert config["family"] == "raster"
    assert [path.name for path in (trained.folder / f"{RUN}/pixels/samples").iterdir()]


def test_engines_and_checkpoint_draw_the_same_pictures(exported: Workplace) -> None:
    two = ("--num-images", 2)
    ours = exported.picture("ours", "--fp32", *two)
    theirs = exported.picture("theirs", "--checkpoint", f"{RUN}/checkpoint", *two)
    assert pixels(ours).shape == (16, 16, 3)
    assert np.array_equal(pixels(ours), pixels(theirs))
    other = ours.with_name("001_image_seed1.png")
    assert not np.array_equal(pixels(ours), pixels(other))
    assert np.array_equal(pixels(other), pixels(theirs.with_name(other.name)))
    assert "prompt" not in read_metadata(ours)


def test_its_own_setting_reaches_the_stages(exported: Workplace) -> None:
    black = exported.picture("black", "--fp16", "--ink-bias", 1000)
    assert pixels(black).max() == 0
    assert json.loads(read_metadata(black)["sampling"]) == {"ink_bias": 1000, "temperature": 1}
    white = exported.picture("white", "--ink-bias=-1000", "--save-intermediates")
    assert pixels(white).min() == 255
    table = exported.folder / "mixed.csv"
    table.write_text("seed,ink_bias\n0,1000\n0,\n")
    mixed = exported.picture("mixed", "--fp16", "--prompts-file", table)
    assert pixels(mixed).max() == 0
    assert pixels(mixed.with_name("001_image_seed0.png")).max() > 0  # in the same batch
    rows = sorted(path.name for path in (white.parent / "tokens").iterdir())
    assert len(rows) == 16  # the end of every row of pixels
    assert "000_image_seed0_tokens256.png" in rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "red apple"), "unconditional: it takes no prompts"),
        (("--class-id", "1"), "unconditional: it takes no prompts and no class ids"),
        (("--top-k", "3"), "--top-k is not a setting of family raster, which has --temperature"),
        (("--temperature", "0"), r"temperature must be in \[0.001, 1000\]"),
    ],
)
def test_what_it_does_not_have_is_refused(
    exported: Workplace, options: tuple[str, ...], words: str
) -> None:
    found = exported.nsp("generate", "--engine-dir", ENGINES, *options, code=2)
    assert re.search(f"error: .*{words}", found.stderr)


def test_exported_stages_are_proved_again_beside_torch_and_alone(exported: Workplace) -> None:
    beside = exported.nsp("verify", ENGINES, "--fp32").stdout
    assert re.search(r"step +ok +512 calls", beside)
    alone = exported.nsp("verify", ENGINES, "--fp16", "--recorded").stdout
    assert re.search(r"step +ok +2 calls", alone)
    (recorded,) = (exported.folder / ENGINES).glob("reference/*/*")
    assert recorded.stat().st_size < MOST_RECORDED


def test_both_kinds_of_folders_are_described(exported: Workplace) -> None:
    engines = json.loads(exported.nsp("inspect", ENGINES, "--json").stdout)
    assert engines["family"] == "raster"
    assert {v["precision"] for v in engines["stages"]["step"]} == {"fp32", "fp16"}
    assert len(engines["stages"]["step"][0]["parity"]["units"]) == 16  # not 256
    assert "net.*" in exported.nsp("inspect", ENGINES, "--all").stdout
    assert "raster" in exported.nsp("inspect", f"{RUN}/checkpoint").stdout


def test_a_backend_of_another_package_plays_its_engines(exported: Workplace) -> None:
    install(exported.site, "good_one", {"mine": "good_one:RECORD"}, BACKEND, BACKEND_GROUP)
    ours = exported.picture("builtin", "--backend", "onnxruntime", "--fp32")
    theirs = exported.picture("plugin", "--backend", "mine", "--fp32")
    assert np.array_equal(pixels(ours), pixels(theirs))
    assert read_metadata(theirs)["backend"] == "mine"
    verified = exported.nsp("verify", ENGINES, "--backend", "mine", "--fp32", "--recorded")
    assert "mine fp32 against" in verified.stdout


def test_it_is_timed_beside_torch(exported: Workplace) -> None:
    small = (
        "--engine-dir",
        ENGINES,
        "--quick",
        "--rounds",
        3,
        "--batch-size",
        2,
        "--output-dir",
        "bench",
    )
    found = exported.nsp("bench", *small, "--rival", "plain-onnx")
    assert "trusted" in found.stdout
    result = json.loads((exported.folder / "bench/bench.json").read_text())
    assert result["parity"]["forced"] is False  # its orders carry no tokens
    assert {step["free_token_agreement"] for step in result["parity"]["steps"]} == {1.0}
    assert result["model"]["schedule"] == [16]
    assert result["model"]["num_tokens"] == 256
    assert result["contract"]["conditions"] == ["seed 0", "seed 1"]
    (batch,) = result["batches"]
    rows = {row["name"]: row["calls"] for row in batch["rows"]}
    assert rows["step"] == rows["select"] == 256
    names = [row["name"] for row in batch["step_rows"]]  # a line per row of pixels, not per pixel
    assert (names[0], names[-1], len(names)) == ("tokens 1 to 16", "tokens 241 to 256", 16)
    assert [other["missing"] for other in result["others"]] == [None]
    assert len((exported.folder / "bench/bench.md").read_text().splitlines()) < 170
    assert (exported.folder / "bench/bench.html").is_file()
