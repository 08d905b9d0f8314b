"""Options of `train.py` that a recipe or a family brings, from the signature of its function."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from nsp.console.command_line import Grouped, OneLineErrors
from nsp.console.common_options import FOLDER
from nsp.errors import ConfigError, NspError
from nsp.family.signature import Parameter, Range, environment, parameters

_OWN = "nsp.own_options"  # where a context keeps what was found for its command line


@dataclass(frozen=True)
class Own:
    """The options of the chosen recipe, and the groups of options that --help shows."""

    owner: str = ""
    options: Sequence[click.Option] = ()
    groups: Sequence[tuple[str, list[click.Option]]] = field(default=())
    # Options of every run that this recipe reads from variables, too, by name.
    common: Mapping[str, click.Option] = field(default_factory=dict)


class TrainCommand(Grouped, OneLineErrors):
    """A command that finds the recipe first, then has the recipe's options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments: once to find the recipe, then with its options."""
        finder = self.make_parser(ctx)
        finder.ignore_unknown_options = True
        chosen, _, _ = finder.parse_args(list(args))
        common = super().get_params(ctx)
        wants_help = bool({"-h", "--help"} & set(args))
        ctx.meta[_OWN] = own_options(chosen, common, wants_help=wants_help)
        if not wants_help:
            self._refuse_foreign(ctx, args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; log records go to stderr, and a warning that is repeated only once."""
        from nsp.console.terminal import logs_on_stderr

        with logs_on_stderr(verbose=ctx.params["verbose"]):
            return super().invoke(ctx)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the common options, and those of the recipe."""
        own: Own = ctx.meta.get(_OWN, Own())
        return [
            *(own.common.get(each.name or "", each) for each in super().get_params(ctx)),
            *own.options,
        ]

    def option_groups(self, ctx: click.Context) -> dict[str, list[click.Parameter]]:
        """Return the groups of every run, and one for each recipe with options of its own."""
        own: Own = ctx.meta.get(_OWN, Own())
        common = {
            title: [own.common.get(each.name or "", each) for each in options]
            for title, options in super().option_groups(ctx).items()
        }
        return {
            **common,
            **{title: [*options] for title, options in own.groups},
        }

    def _refuse_foreign(self, ctx: click.Context, args: Sequence[str]) -> None:
        """Raise ConfigError for an option that only other recipes have, and name these."""
        from nsp.family.recipes import presets_with

        known = {
            word for each in self.get_params(ctx) for word in (*each.opts, *each.secondary_opts)
        }
        for arg in args:
            word = arg.partition("=")[0].replace("_", "-")
            if not word.startswith("--") or word in {*known, "--"}:
                continue
            name = word.removeprefix("--").removeprefix("no-").replace("-", "_")
            if others := presets_with(name):
                owner = ctx.meta[_OWN].owner
                raise ConfigError(
                    f"{word} is not an option of {owner}; presets with it: {', '.join(others)}"
                )


def own_options(
    chosen: dict[str, Any], params: Sequence[click.Parameter], *, wants_help: bool
) -> Own:
    """Return what the recipe, the file or the stopped run of a command line adds to its options.

    `params` are the options of every run.
    """
    from nsp.family.recipes import default_recipe, recipe, recipes

    common: set[str | None] = {each.name for each in params}

    if chosen.get("preset") is None and (folder := _place_of(chosen)) is not None:
        return _of_family(folder, params)
    if wants_help and chosen.get("preset") is None:
        own: dict[str, Parameter] = {}
        owners: dict[str, list[str]] = {}  # option -> presets that have it
        for name, found in recipes(built_in_only=True).items():
            for each in _without(found.parameters, common):
                own.setdefault(each.name, each)
                owners.setdefault(each.name, []).append(name)
        grouped: dict[str, list[click.Option]] = {}
        for option, names in owners.items():
            title = f"Options of --preset {' or '.join(names)}"
            grouped.setdefault(title, []).append(option_of(own[option]))
        return Own(groups=[*grouped.items()])
    found = recipe(chosen.get("preset") or default_recipe(chosen))
    options = [*map(option_of, _without(found.parameters, common))]
    groups = [(f"Options of --preset {found.name}", options)] if options else []
    read = _reading(params, environment(found.make))
    return Own(f"preset {found.name}", options, groups, read)


def _reading(
    params: Sequence[click.Parameter], variables: Mapping[str, str]
) -> Mapping[str, click.Option]:
    """Return copies of options of every run that read these variables, by name."""
    found: dict[str, click.Option] = {}
    for each in params:
        if isinstance(each, click.Option) and each.name in variables:
            found[each.name] = option = copy.copy(each)
            option.envvar, option.show_envvar = variables[each.name], True
    return found


def _place_of(chosen: dict[str, Any]) -> Path | None:
    """Return the file or the run folder that a command line continues from, if any."""
    if config := chosen.get("config"):
        return Path(config)
    if place := chosen.get("resume_from"):
        found = [
            each for each in (Path(place), *Path(place).parents) if (each / "run.json").is_file()
        ]
        return found[0] / "run.json" if found else Path(place)
    if chosen.get("resume"):
        from nsp.family.recipes import default_recipe

        name = default_recipe(chosen)
        return Path(chosen.get("output_dir") or Path("runs", name)) / "run.json"
    return None


def _of_family(path: Path, params: Sequence[click.Parameter]) -> Own:
    """Return the options that the family of a run in a file has for it."""
    from nsp.console.run_files import run_values
    from nsp.family.registry import family

    try:
        values = run_values(path)
        name = str(values.get("family"))
        change = family(name).options_of(values)
    except (NspError, OSError):  # the command itself reports what is wrong with the file
        return Own("this run")
    if change is None:
        return Own(f"family {name}")
    made = [*map(option_of, _without(parameters(change, skip=1), {each.name for each in params}))]
    read = _reading(params, environment(change, skip=1))
    return Own(f"family {name}", made, [(f"Options of family {name}", made)] if made else [], read)


def _without(found: Sequence[Parameter], common: set[str | None]) -> tuple[Parameter, ...]:
    """Return the parameters that are not options of every run."""
    return tuple(each for each in found if each.name not in common)


def option_of(parameter: Parameter) -> click.Option:
    """Return the option for a parameter; its value is None unless it is given."""
    words = parameter.name.replace("_", "-")
    spelled = f"--{words}/--no-{words}" if parameter.kind is bool else f"--{words}"
    shows = parameter.default is not None and parameter.kind is not bool
    default = f"  [default: {parameter.default}]" if shows else ""
    return click.Option(
        [spelled, parameter.name],
        type=_type(parameter),
        default=None,
        help=parameter.help + default,
        envvar=parameter.env,
        show_envvar=parameter.env is not None,
    )


def _type(parameter: Parameter) -> "click.ParamType[Any] | type":
    limits = parameter.range
    if parameter.choices:
        return click.Choice(parameter.choices)
    if parameter.kind is Path:
        return FOLDER
    if limits == Range():
        return parameter.kind
    if parameter.kind is float:
        return click.FloatRange(
            limits.least,
            limits.most,
            min_open=limits.is_open and limits.least is not None,
            max_open=limits.is_open and limits.most is not None,
        )
    if parameter.kind is int:
        least, most = (None if each is None else int(each) for each in (limits.least, limits.most))
        return click.IntRange(least, most)
    return parameter.kind
