"""A recipe's signature says everything that an option needs."""

from pathlib import Path
from typing import Annotated, Literal, TypedDict, Unpack

import pytest

from nsp.errors import ConfigError
from nsp.family.recipe import RunConfig
from nsp.family.recipes import Recipe, recipes
from nsp.family.signature import (
    Env,
    OutputDir,
    Parameter,
    PlannedAs,
    Range,
    output_dir,
    parameters,
    planned_as,
)


class Shared(TypedDict, total=False):
    vae: Annotated[Path, "A folder"]


def recipe(
    *,
    data: Annotated[str, "Pictures"],
    kind: Literal["a", "b"] = "a",
    count: Annotated[int | None, "How many", Range(2, 5), Env("NSP_COUNT")] = None,
    is_new: bool = False,
    **shared: Unpack[Shared],
) -> Annotated[object, OutputDir("here")]:
    return data


def test_types_defaults_help_ranges_and_variables_are_read() -> None:
    assert parameters(recipe) == (
        Parameter(name="data", kind=str, is_required=True, help="Pictures"),
        Parameter(name="kind", kind=str, choices=("a", "b"), default="a"),
        Parameter(name="count", kind=int, help="How many", range=Range(2, 5), env="NSP_COUNT"),
        Parameter(name="is_new", kind=bool, default=False),
        Parameter(name="vae", kind=Path, help="A folder"),
    )
    assert output_dir(recipe) == Path("here")


def test_a_recipe_says_with_which_options_it_is_planned_without_data() -> None:
    def reads(*, start_from: str = "model") -> Annotated[object, PlannedAs(None)]:
        return start_from

    def names(*, data: str) -> Annotated[object, PlannedAs({"data": "folder"})]:
        return data

    assert planned_as(lambda: None) == {}
    assert planned_as(recipe) is None  # it needs --data and does not say what stands for it
    assert planned_as(reads) is None
    assert planned_as(names) == {"data": "folder"}


PLANNED = {
    n: each for n, each in recipes(built_in_only=True).items() if each.planned_as is not None
}


@pytest.mark.parametrize("name", sorted(PLANNED))
def test_a_recipe_that_can_be_planned_reads_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(PLANNED[name].run(**(PLANNED[name].planned_as or {})), RunConfig)


@pytest.mark.parametrize("make", [lambda sizes: None, lambda *a: None, lambda **a: None])
def test_a_parameter_that_no_option_can_give_is_refused(make: object) -> None:
    with pytest.raises(ConfigError, match="cannot be an option"):
        parameters(make)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "preset mine needs --data: Pictures"),
        (
            {"data": "x", "counts": 3},
            "--counts is not an option of preset mine, nearest",
        ),
        ({"data": "x", "count": 6}, "--count must be a number from 2 to 5, not 6"),
    ],
)
def test_python_callers_are_told_what_the_command_line_is(
    options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe("mine", "var", recipe).run(**options)
