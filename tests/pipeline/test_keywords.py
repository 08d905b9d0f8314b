"""Type checkers know every keyword of a pipeline's calls, and no other."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from nsp.family.registry import BUILT_IN, family
from nsp.pipeline.keywords import Requested, Settings

ROOT = Path(__file__).parents[2]


def test_the_settings_are_those_of_the_built_in_families() -> None:
    names = {each.name for name in BUILT_IN for each in dataclasses.fields(family(name).sampling)}
    assert typing.get_type_hints(Settings).keys() == names


def test_the_arrays_are_those_that_their_orders_carry() -> None:
    owners = [family(name) for name in BUILT_IN]
    carried = {name for owner in owners for name in owner.given(owner.sizes["tiny"])}
    assert typing.get_type_hints(Requested).keys() - typing.get_type_hints(Settings).keys() == (
        carried
    )


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("pipe('red apple', guidance_scal=2.0)", "guidance_scal"),
        ("pipe('red apple', top_k='five')", "top_k"),
        ("pipe.generate(prompts=['red apple'], uniform=None)", "uniform"),
        ("nsp.Pipeline.from_pretrained('engines', thread=2)", "thread"),
        ("pipe('red apple', output_type='jpg')", "output_type"),
    ],
)
def test_a_typo_is_a_type_error(mypy_output: dict[str, str], line: str, word: str) -> None:
    assert word in mypy_output[line]


@pytest.fixture(scope="module")
def mypy_output(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """Return by line what mypy says about each wrong line, of one run over all of them."""
    (mark,) = test_a_typo_is_a_type_error.pytestmark
    lines = [line for line, _ in mark.args[1]]
    right = "pipe('red apple', guidance_scale=2, top_k=5, num_images_per_prompt=2).images"
    folder = tmp_path_factory.mktemp("typed")
    script = folder / "script.py"
    head = ["import nsp", "pipe = nsp.Pipeline.from_pretrained('engines', num_threads=2)", right]
    script.write_text("\n".join([*head, *lines]) + "\n")
    command = [sys.executable, "-m", "mypy", "--follow-imports", "silent", "--no-error-summary"]
    done = subprocess.run(
        [*command, "--cache-dir", str(folder / "cache"), str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    said = [line.split(":", 2) for line in done.stdout.splitlines() if "script.py" in line]
    found = dict.fromkeys(lines, "")
    for _, number, text in said:
        assert int(number) > len(head), done.stdout
        found[lines[int(number) - len(head) - 1]] += text
    return found
