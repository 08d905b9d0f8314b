"""Imports point one way: floors stand on lower ones, and no module imports itself by a detour.

Imports inside functions and under TYPE_CHECKING count, too: a floor that needs one above it, even
now and then or for a type alone, cannot be read or changed without it.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up; what is on one line may import its neighbours, but in no circle. A name is
# what follows `nsp.`: a module or a package with all that is in it.
FLOORS = (
    "errors config values files cores distribution walk csv_rows sniff paths child plugins",
    "stage",
    "layers weights diffusion",
    "data text",
    "evaluation",
    "family",
    "backends",
    "artifacts",
    "pipeline",
    "training",
    "raster",
    "families",
    "console",
    "export",
    "benchmarks",
    "cli train __main__",
    "testing",
)
FRONT_DOOR = "nsp"  # shows users what lies above it; nobody inside goes through it


def modules(root: Path = ROOT) -> dict[str, ast.Module]:
    """Return the syntax tree of every module of the product, by its name."""
    found = {}
    for top in ("nsp", "export", "benchmarks"):
        for file in sorted((root / top).rglob("*.py")):
            if not any(each.is_symlink() for each in (file, *file.parents) if each != root):
                found[module_name(file.relative_to(root))] = ast.parse(file.read_text())
    for program in ("cli", "train"):
        found[f"nsp.{program}"] = ast.parse((root / f"{program}.py").read_text())
    return found


def module_name(file: Path) -> str:
    """Return the name under which a file, relative to the checkout, is imported."""
    parts = file.with_suffix("").parts
    parts = parts if parts[0] == "nsp" else ("nsp", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, known: Set[str]) -> Iterator[str]:
    """Yield our own modules that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.split(".")[0] == "nsp")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its floor"
            module = node.module or ""
            if module.split(".")[0] == "nsp":
                names = (f"{module}.{each.name}" for each in node.names)
                yield from (name if name in known else module for name in names)


def floor_of(module: str) -> int:
    """Return the number of a module's floor; an unknown one fails the test."""
    name = module.split(".")[1]
    for number, names in enumerate(FLOORS):
        if name in names.split():
            return number
    pytest.fail(f"{module} is on no floor: add it to FLOORS, as low as its imports let it")


def runs_up(graph: Mapping[str, Set[str]]) -> list[str]:
    """Return every import of a higher floor, and of the front door."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        if module != FRONT_DOOR
        for other in sorted(others)
        if other == FRONT_DOOR or floor_of(other) > floor_of(module)
    ]


def circles(graph: Mapping[str, Set[str]]) -> list[str]:
    """Return a circle for every module that is in one and was in none before."""
    found: list[str] = []
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" -> ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                follow(other, (*path, module))
            done.add(module)

    for module in graph:
        follow(module, ())
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """What each module imports of the others."""
    trees = modules()
    return {name: set(imports(tree, trees.keys())) for name, tree in trees.items()}


def test_no_import_runs_up(graph: dict[str, set[str]]) -> None:
    assert runs_up(graph) == []


def test_no_module_imports_itself_by_a_detour(graph: dict[str, set[str]]) -> None:
    assert circles({name: others for name, others in graph.items() if name != FRONT_DOOR}) == []


def test_both_programs_are_thin() -> None:
    for program in ("cli.py", "train.py"):
        assert len((ROOT / program).read_text().splitlines()) < 60, program


def test_no_name_of_a_file_is_there_twice(graph: dict[str, set[str]]) -> None:
    """But for the rooms that every family has, each in its own folder, and programs of folders."""
    named = defaultdict(list)
    for module in graph:
        floor = module.split(".")[1] if "." in module else ""
        is_program = module.endswith(".__main__")
        if floor not in ("families", "benchmarks") and not (is_program or is_package(module)):
            named[module.rpartition(".")[2]].append(module)
    assert [places for places in named.values() if len(places) > 1] == []


def is_package(module: str) -> bool:
    """Return whether a module is a folder."""
    path = module.replace(".", "/")
    return (ROOT / path).is_dir() or (ROOT / path.removeprefix("nsp/")).is_dir()


@pytest.mark.parametrize(
    "source",
    [
        "import nsp.console.gallery",
        "from nsp.console import gallery",
        "from nsp.console.gallery import generate_gallery",
        "def late():\n    from nsp.console.gallery import generate_gallery",
        "if TYPE_CHECKING:\n    from nsp.console.gallery import Gallery",
    ],
)
def test_an_import_that_runs_up_is_found_however_it_is_written(source: str) -> None:
    known = {"nsp.console", "nsp.console.gallery"}
    found = {"nsp.stage.io": set(imports(ast.parse(source), known))}
    assert runs_up(found) == ["nsp.stage.io imports nsp.console.gallery"]


def test_a_circle_is_found_however_long() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": {"a"}, "e": set()}
    assert circles(graph) == ["b -> c -> b", "a -> b -> d -> a"]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_map_has_every_package() -> None:
    shown = (ROOT / "ARCHITECTURE.md").read_text()
    packages = [path.parent.name for path in (ROOT / "nsp").glob("*/__init__.py")]
    assert len(packages) > 10
    assert [p for p in packages if f"nsp/{p}" not in shown and f"nsp.{p}" not in shown] == []
