"""A recipe's signature, read as options: names, types, defaults, help and ranges, without torch.

    def sdxl(*, vae: Annotated[Path | None, "AutoencoderKL folder"] = None,
             scale_factor: Annotated[int, "Ratio of two sides", Range(2)] = 2,
             seed: Annotated[int, "Seed", Env("MY_SEED")] = 0,
    ) -> Annotated[RunConfig, OutputDir("outputs"), PlannedAs({"vae": "folder"})]: ...

Recipes that share options declare them once, as a TypedDict of `**options: Unpack[...]`. An option
that every run has (nsp/console/train_options.py) may be a parameter, too: it is then required, or
has another default.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nsp.errors import ConfigError

Kind: TypeAlias = type[bool] | type[int] | type[float] | type[str] | type[Path]
_KINDS: tuple[Kind, ...] = (bool, int, float, str, Path)


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value of a number; None: no limit.

    Of an open range the limits themselves are no values.
    """

    least: float | None = None
    most: float | None = None
    is_open: bool = False


@dataclass(frozen=True)
class Env:
    """The environment variable that gives a value if the command line does not."""

    name: str


@dataclass(frozen=True)
class OutputDir:
    """The run folder of a recipe if none is given; annotates its result.

    `env` is the environment variable that names another one.
    """

    folder: str
    env: str | None = None


@dataclass(frozen=True)
class PlannedAs:
    """How `nsp plan` asks a recipe for its run, without data or weights; annotates its result.

    `options` stand for what the recipe needs of the user but does not read; None: it reads files,
    so that it cannot be planned. A recipe that says nothing is asked without options.
    """

    options: Mapping[str, str] | None


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One option of a recipe."""

    name: str
    kind: Kind
    choices: tuple[str, ...] = ()
    default: object = None
    is_required: bool = False
    help: str = ""
    range: Range = Range()
    env: str | None = None


def parameters(make: Callable[..., Any], *, skip: int = 0) -> tuple[Parameter, ...]:
    """Return the options of a recipe, without its first `skip` parameters.

    Raises ConfigError for a parameter that cannot be an option.
    """
    found: list[Parameter] = []
    for each in list(_signature(make).parameters.values())[skip:]:
        if each.kind is each.VAR_KEYWORD and typing.get_origin(each.annotation) is typing.Unpack:
            (shared,) = typing.get_args(each.annotation)
            hints = typing.get_type_hints(shared, include_extras=True)
            found += [_parameter(name, hint, None) for name, hint in hints.items()]
        elif each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD):
            found.append(_parameter(each.name, each.annotation, each.default))
        else:
            raise ConfigError(f"recipe parameter {each} cannot be an option: it is not a keyword")
    return tuple(found)


def output_dir(make: Callable[..., Any]) -> Path | None:
    """Return the run folder that a recipe has of its own, if it has one."""
    folders = [each for each in _notes_of_result(make) if isinstance(each, OutputDir)]
    return Path(folders[0].folder) if folders else None


def environment(make: Callable[..., Any], *, skip: int = 0) -> Mapping[str, str]:
    """Return the variables that a recipe reads, by the names of its options and of `output_dir`."""
    found = {each.name: each.env for each in parameters(make, skip=skip) if each.env is not None}
    for note in _notes_of_result(make):
        if isinstance(note, OutputDir) and note.env is not None:
            found["output_dir"] = note.env
    return found


def planned_as(make: Callable[..., Any]) -> Mapping[str, str] | None:
    """Return the options with which a recipe is planned; None if it cannot be.

    That is one that says so, and one that needs an option and does not say what stands for it.
    """
    told = [each.options for each in _notes_of_result(make) if isinstance(each, PlannedAs)]
    options = told[0] if told else {}
    needed = {each.name for each in parameters(make) if each.is_required}
    return None if options is None or needed - options.keys() else options


def _notes_of_result(make: Callable[..., Any]) -> tuple[object, ...]:
    return getattr(_signature(make).return_annotation, "__metadata__", ())


def _signature(make: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(make, eval_str=True)
    except Exception as error:  # names in quotes that the module does not have
        raise ConfigError(f"the signature of {make!r} cannot be read ({error})") from error


def _parameter(name: str, hint: Any, default: object) -> Parameter:
    """Return the option for one parameter of a function."""
    hint, notes = _plain(hint, ())
    choices: tuple[str, ...] = ()
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal and all(isinstance(o, str) for o in options):
        hint, choices = str, options
    if hint not in _KINDS:
        known = ", ".join(each.__name__ for each in _KINDS)
        raise ConfigError(
            f"recipe parameter {name}: {hint} cannot be an option; it must be {known}, a Literal "
            "of texts, or one of these or None"
        )
    return Parameter(
        name=name,
        kind=hint,
        choices=choices,
        default=None if default is inspect.Parameter.empty else default,
        is_required=default is inspect.Parameter.empty,
        help=next((note for note in notes if isinstance(note, str)), ""),
        range=next((note for note in notes if isinstance(note, Range)), Range()),
        env=next((note.name for note in notes if isinstance(note, Env)), None),
    )


def _plain(hint: Any, notes: tuple[object, ...]) -> tuple[Any, tuple[object, ...]]:
    """Return a type without Annotated and "or None", and what Annotated says about it."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        return _plain(arguments[0], (*notes, *arguments[1:]))
    options = [each for each in arguments if each is not types.NoneType]
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and len(options) == 1:
        return _plain(options[0], notes)
    return hint, notes
