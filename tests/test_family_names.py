"""No product code outside a family's folder names it, but for one line of the table of families.

Benchmarks name no family's stage, either: what they tell of comes from the steps and their calls.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsp.family.registry import BUILT_IN, family

ROOT = Path(__file__).parents[1]
TABLE = ("nsp/family/registry.py",)
_CLASSES = {place.rpartition(":")[2] for place in BUILT_IN.values()}


def names(source: str) -> Iterator[str]:
    """Yield where a source names a built-in family, in an import, an identifier or a text."""
    # "var(--" is a function of CSS.
    words = re.compile(rf"\b({'|'.join([*BUILT_IN, *_CLASSES])})\b(?!\(--)")
    for node in ast.walk(ast.parse(source)):
        found = ()
        if isinstance(node, ast.Import):
            found = tuple(each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            found = (node.module or "", *(each.name for each in node.names))
        elif isinstance(node, ast.Name):
            found = (node.id,)
        elif isinstance(node, ast.Attribute):
            found = (node.attr,)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = (node.value,)
        for each in found:
            if words.search(each.replace(".", " ")) or "nsp.families." in each:
                yield f"line {node.lineno}: {each.strip()[:60]!r}"


def sources() -> Iterator[Path]:
    for top in ("nsp", "export", "benchmarks"):
        for file in sorted((ROOT / top).rglob("*.py")):
            if not any(part.is_symlink() for part in (file, *file.parents) if part != ROOT):
                yield file
    yield from (ROOT / "cli.py", ROOT / "train.py")


def test_families_are_named_in_their_folders_and_in_the_table_alone() -> None:
    found = {}
    for file in sources():
        place = file.relative_to(ROOT).as_posix()
        if place.startswith("nsp/families/") or place in TABLE:
            continue
        if lines := list(names(file.read_text())):
            found[place] = lines
    assert found == {}


def test_benchmarks_name_no_stage() -> None:
    stages = {
        stage
        for name in BUILT_IN
        for config in family(name).sizes.values()
        for stage in family(name).stages(config, kv_layout="delta", dtype="float32")
    } - {"step", "base"}  # words of every program
    found = {}
    for file in (ROOT / "benchmarks").rglob("*.py"):
        place = file.relative_to(ROOT).as_posix()
        texts = {
            node.value
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        if texts & stages:
            found[place] = texts & stages
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "from nsp.families.var import Var",
        "import nsp.families.next_scale.loop",
        "if name == 'var':\n    pass",
        "help = 'Model family: next_scale.'",
        "NextScale()",
    ],
)
def test_a_name_is_found_however_it_is_written(source: str) -> None:
    assert list(names(source))


def test_words_that_hold_a_name_are_none() -> None:
    assert not list(names("variance = variants['covar'] + ' next scale '"))
