"""What opens files of users is called in the rooms that docs/inputs.md names, nowhere else."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("nsp", "export", "benchmarks", "cli.py", "train.py")
# Call -> the modules it can be imported from by its last name.
DOORS = {
    "torch.load": ("torch", "load"),
    "safe_open": ("safetensors", "safe_open"),
    "load_file": ("safetensors", "load_file"),
    "Image.open": ("PIL.Image", "open"),
    "os.walk": ("os", "walk"),
    "rglob": ("", "rglob"),
}


def doors_of(source: str) -> Iterator[str]:
    """Yield every door that a module's syntax tree names, also under another name."""
    tree = ast.parse(source)
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        for door, (module, name) in DOORS.items():
            if isinstance(node, ast.ImportFrom) and node.module and module:
                inside = node.module == module or node.module.startswith(f"{module}.")
                if inside and any(alias.name == name for alias in node.names):
                    yield door
            elif isinstance(node, ast.Attribute) and node.attr == name:
                owner = ast.unparse(node.value)
                owner = ".".join([modules.get(owner.split(".")[0], owner), *owner.split(".")[1:]])
                if name in ("safe_open", "load_file", "rglob") or owner == module:
                    yield door


def documented() -> dict[str, set[str]]:
    """Return {call: files} of the table in docs/inputs.md."""
    text = (ROOT / "docs/inputs.md").read_text()
    rows = re.findall(r"^\| `([^`|]+)` \| (.+?) \|", text, re.MULTILINE)
    return {call: set(re.findall(r"`([^`]+\.py)`", cells)) for call, cells in rows if call in DOORS}


def test_files_of_users_are_opened_in_the_documented_rooms_only() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for top in PRODUCT:
        path = ROOT / top
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            for door in doors_of(file.read_text()):
                found[door].add(str(file.relative_to(ROOT)))
    assert {door: found[door] for door in DOORS} == documented()


@pytest.mark.parametrize(
    ("source", "door"),
    [
        ("import torch\ntorch.load('x')", "torch.load"),
        ("import torch as t\nt.load('x')", "torch.load"),
        ("from torch import load as read", "torch.load"),
        ("from safetensors.numpy import load_file", "load_file"),
        ("import safetensors\nsafetensors.torch.load_file('x')", "load_file"),
        ("from safetensors import safe_open", "safe_open"),
        ("from PIL import Image\nImage.open('x')", "Image.open"),
        ("import PIL.Image\nPIL.Image.open('x')", "Image.open"),
        ("from PIL import Image as I\nI.open('x')", "Image.open"),
        ("import os\nos.walk('x')", "os.walk"),
        ("from os import walk", "os.walk"),
        ("from pathlib import Path\nPath('x').rglob('*')", "rglob"),
    ],
)
def test_a_door_is_found_however_it_is_spelled(source: str, door: str) -> None:
    assert door in set(doors_of(source))


def test_other_functions_of_these_names_are_none() -> None:
    assert not set(doors_of("import json\njson.load(file)\nPath('x').open()\nopen('x')"))


def test_the_documented_places_are_there() -> None:
    rows = re.findall(r"^\| [^|]+ \| (.+) \|$", (ROOT / "docs/inputs.md").read_text(), re.MULTILINE)
    places = [part for row in rows for part in row.split("; ")]
    named = 0
    for place in places:
        for file in re.findall(r"`([^`]+\.py)`", place):
            source = (ROOT / file).read_text()
            for name in re.findall(r"`([A-Za-z_][\w.]*)`", place.partition(":")[2]):
                named += 1
                last = name.rpartition(".")[2]
                assert re.search(rf"(def|class) {last}\b|^{last} =|\b{last}:", source, re.M), name
    assert named > 20
