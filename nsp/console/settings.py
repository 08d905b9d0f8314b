"""What a family lets one image have on the command line, each an option of `nsp generate`.

These are the fields of its sampling record, and the arrays of `given`, which are read from files.
"""

import dataclasses
import logging
import types
import typing
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from nsp import values
from nsp.console.command_line import Verb
from nsp.console.common_options import FILE
from nsp.errors import ConfigError
from nsp.family.registry import BUILT_IN, family, family_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nsp.config import ModelConfig
    from nsp.console.prompt_lists import ListedImage
    from nsp.family.contract import AnyFamily
    from nsp.family.order import Given, Order, S

logger = logging.getLogger(__name__)


class SamplingVerb(Verb):
    """A verb with an option for every setting of every family, created when needed."""

    _settings: "Mapping[str, list[click.Option]]" = MappingProxyType({})  # by their title

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; families are asked for their settings only if an option may be one.

        So a picture without settings does not wait 10 ms for all built-in families, and one of a
        built-in family does not wait 25 ms for those of other packages.
        """
        words = {arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("-")}
        if not self._knows(words, ctx):
            own = {option.name for option in super().get_params(ctx)}
            self._settings = sampling_options([*BUILT_IN], own)
            if not self._knows(words, ctx):
                self._settings = sampling_options(family_names(), own)
        return super().parse_args(ctx, args)

    def _knows(self, words: Set[str], ctx: click.Context) -> bool:
        """Return whether these options are known now; --help shows those of all families."""
        options = self.get_params(ctx)
        known = {word.replace("_", "-") for o in options for word in (*o.opts, *o.secondary_opts)}
        return words <= known - {"--help", "-h"}

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the verb's own parameters, and the settings."""
        return [*super().get_params(ctx), *chain(*self._settings.values())]

    def option_groups(self, ctx: click.Context) -> dict[str, list[click.Parameter]]:
        """Return the verb's own groups, and one for the settings of each set of families."""
        return {**super().option_groups(ctx), **{k: [*v] for k, v in self._settings.items()}}


def sampling_options(
    known: Sequence[str], own: Set[str | None] = frozenset()
) -> dict[str, list[click.Option]]:
    """Return an option for every setting of these families, under titles that name the families.

    Two families may share a name only with the same type: a plugin's other type is left out, and
    so is a setting called like one of the verb's `own` options.
    """
    owners: dict[str, list[str]] = {}
    options: dict[str, dict[str, Any]] = {}
    spelled: dict[str, list[str]] = {}
    for name in known:
        for word, made in _options_of(family(name)).items():
            if word in own:
                logger.warning(
                    "the setting %s of family %s is left out: the verb has an option of that name",
                    *(word, name),
                )
                continue
            if options.setdefault(word, made)["type"] != made["type"]:
                logger.warning(
                    "the setting %s of family %s is left out: its type is not that of family %s",
                    *(word, name, owners[word][0]),
                )
                continue
            owners.setdefault(word, []).append(name)
            spelled.setdefault(word, []).extend(_spellings(family(name), word))
    groups: dict[str, list[click.Option]] = {}
    for name, option in options.items():
        every = len(owners[name]) == len(known)
        title = f"Settings of {'every family' if every else ' and '.join(owners[name])}"
        words = name.replace("_", "-")
        first = f"--{words}/--no-{words}" if option["type"] is bool else f"--{words}"
        declared = [name, first, *dict.fromkeys(spelled[name])]
        groups.setdefault(title, []).append(click.Option(declared, **option))
    return groups


def _options_of(owner: "AnyFamily") -> dict[str, dict[str, Any]]:
    """Return click's arguments for every setting of a family, then for the arrays it takes."""
    hints = typing.get_type_hints(owner.sampling)
    fields = dataclasses.fields(owner.sampling)
    made = {each.name: _option(hints[each.name], each.metadata.get("help", "")) for each in fields}
    declared = owner.given(next(iter(owner.sizes.values())))  # names do not depend on the size
    return made | {
        name: {"type": FILE, "default": None, "help": f"File (.npy). {each.help}".rstrip()}
        for name, each in declared.items()
    }


def _spellings(owner: "AnyFamily", setting: str) -> Sequence[str]:
    """Return the other spellings of a setting's option, those of a first implementation."""
    fields = {each.name: each for each in dataclasses.fields(owner.sampling)}
    return fields[setting].metadata.get("spelled", ()) if setting in fields else ()


def _option(hint: Any, help_text: str) -> dict[str, Any]:
    """Return click's arguments for a field of this type."""
    arguments = [each for each in typing.get_args(hint) if each is not types.NoneType]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return _option(arguments[0], help_text)
    common = {"default": None, "help": help_text}
    if typing.get_origin(hint) is typing.Literal:
        return {"type": click.Choice(arguments), **common}
    if typing.get_origin(hint) is tuple:
        return {"type": arguments[0], "nargs": 2, "metavar": "FROM TO", **common}
    return {"type": hint, **common}


def setting_names(owner: "AnyFamily") -> tuple[str, ...]:
    """Return the names of a family's settings."""
    return tuple(each.name for each in dataclasses.fields(owner.sampling))


def check_settings(owner: "AnyFamily", given: Iterable[str]) -> None:
    """Raise ConfigError for an option that belongs to another family."""
    known = tuple(_options_of(owner))
    if foreign := [name for name in given if name not in known]:
        raise ConfigError(
            f"--{foreign[0].replace('_', '-')} is not a setting of family {owner.name}, which has "
            f"{', '.join('--' + name.replace('_', '-') for name in known)}"
        )


# What to give instead of the name of a class, by the kind of condition: on the command line and in
# a list.
_INSTEAD = {
    "prompt": "has no classes; give --prompt",
    "class": "has no names of classes; give --class-id",
    "none": "has no classes; leave --class out",
}
_INSTEAD_LISTED = {
    "prompt": "has no classes; give prompts",
    "class": "has no names of classes; give numbers",
    "none": "has no classes; leave the column out",
}


def class_numbers(
    owner: "AnyFamily", config: Mapping[str, Any], names: Sequence[str]
) -> tuple[int, ...]:
    """Return the numbers of a model's classes by their names.

    Upper and lower case are alike unless only they tell two classes apart. Raises ConfigError for
    an unknown name, with the nearest one.
    """
    model = owner.config.from_dict(config)
    return tuple(_class_number(owner, model, f"--class {n!r}", n, _INSTEAD) for n in names)


def with_class_numbers(
    owner: "AnyFamily", config: Mapping[str, Any], listed: "Sequence[ListedImage]"
) -> "tuple[ListedImage, ...]":
    """Return the rows of a list with the numbers of classes that are given by name.

    Raises ConfigError as `class_numbers`, naming the line.
    """
    model = owner.config.from_dict(config)
    numbered = []
    for row in listed:
        if (name := row.class_name) is not None:
            where = f"{row.where}: class {name!r}"
            number = _class_number(owner, model, where, name, _INSTEAD_LISTED)
            row = replace(row, class_id=number, class_name=None)
        numbered.append(row)
    return tuple(numbered)


def _class_number(
    owner: "AnyFamily", model: Any, where: str, name: str, instead: Mapping[str, str]
) -> int:
    known = owner.class_names(model)
    if not known:
        raise ConfigError(f"{where}: this model {instead[owner.condition(model)]}")
    if name in known:
        return known.index(name)
    alike = [number for number, each in enumerate(known) if each.lower() == name.lower()]
    if len(alike) > 1:
        both = " or ".join(repr(known[number]) for number in alike)
        raise ConfigError(f"{where} may be {both}; write it as one of them")
    if not alike:
        raise ConfigError(f"{where} is unknown{values.nearest(name, known)}")
    return alike[0]


def check_conditions(
    owner: "AnyFamily | None",
    prompts: Sequence[str],
    class_ids: Sequence[int],
    listed: Sequence["ListedImage"],
) -> None:
    """Raise ConfigError for conditions that no model of the family accepts, before one is loaded.

    None means that the family is not known yet: loading will report why.
    """
    texts = [*prompts, *(row.prompt for row in listed if row.prompt is not None)]
    has_classes = bool(class_ids) or any(row.class_id is not None for row in listed)
    if texts and has_classes:
        raise ConfigError("prompts and class ids are both given; a model takes only one kind")
    if owner is None or not owner.takes_no_prompt:
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise ConfigError(f"prompt {number} is empty; write what the image should show")


def prompts_not_given(
    owner: "AnyFamily", config: "ModelConfig", *, unconditional: bool
) -> tuple[str, ...]:
    """Return the prompts of a command line without conditions: the family's own one, or none.

    Raises ConfigError for a model that needs a prompt or class but shall draw without.
    """
    kind = owner.condition(config)
    if not unconditional:
        if kind == "prompt" and owner.draws_without_prompt:
            raise ConfigError(
                "this model is text-conditional: give --prompt, or --unconditional for pictures "
                "without one"
            )
        return (owner.default_prompt,) if owner.default_prompt else ()
    if kind == "none" or (kind == "prompt" and owner.draws_without_prompt):
        return ()
    if kind == "prompt" and owner.takes_no_prompt:
        return ("",)
    needed = "prompt; give --prompt" if kind == "prompt" else "class; give --class-id"
    raise ConfigError(f"--unconditional: this model always needs a {needed}")


def planned_orders(
    sampling: "S",
    listed: Sequence["ListedImage"],
    *,
    prompts: Sequence[str],
    class_ids: Sequence[int],
    seed: int | Sequence[int],
    num_images: int,
    negative: str | None,
) -> "list[Order[S]]":
    """Return the orders of a command line: its own conditions, then those of a list.

    The k-th image of the same condition has `seed` + k, wherever it is in the list; a row of a list
    may have its own seed, negative prompt and settings. A list of seeds gives each image its own.
    """
    from nsp.pipeline.orders import check_seeds, check_total, make_orders

    wanted: list[tuple[str | int | None, ListedImage | None]] = []
    wanted += [(prompt, None) for prompt in prompts]
    wanted += [(number, None) for number in class_ids]
    wanted += [(row.class_id if row.prompt is None else row.prompt, row) for row in listed]
    wanted = wanted or [(None, None)]
    seeds = None if isinstance(seed, int) else list(seed)
    if seeds is not None and num_images == 1 and wanted == [(None, None)]:
        num_images = len(seeds)
    check_total(len(wanted) * values.count("num_images", num_images))
    if seeds is not None:
        check_seeds(seeds, len(wanted) * num_images)
    made: dict[str | int | None, int] = {}
    planned: list[Order[S]] = []
    for condition, row in wanted:
        settings, null = sampling, negative
        first: int | Sequence[int]
        if isinstance(seed, int):
            first = seed + made.get(condition, 0)
        else:
            first = seed[len(planned) : len(planned) + num_images]
        if row is not None:
            settings = _settings_of(row, sampling)
            null = negative if row.negative is None else row.negative
        if row is not None and row.seed is not None:
            if seeds is not None:
                raise ConfigError(
                    f"{row.where} has a seed of its own, and --seed is given {len(seeds)} times; "
                    "omit either"
                )
            first = row.seed
        else:
            made[condition] = made.get(condition, 0) + num_images
        planned += make_orders(
            settings,
            prompts=[condition] if isinstance(condition, str) else None,
            class_ids=[condition] if isinstance(condition, int) else None,
            seed=first,
            num_images=num_images,
            negative=null,
        )
    return planned


def with_arrays(
    orders: "Sequence[Order[S]]", declared: "Mapping[str, Given]", files: Mapping[str, Path]
) -> "list[Order[S]]":
    """Return the orders with the arrays of files: one for all images, or one row for each.

    Raises ConfigError naming a file that cannot be read, or whose shape does not fit.
    """
    carried: list[dict[str, NDArray[Any]]] = [{} for _ in orders]
    for name, file in files.items():
        expected = declared[name]
        array = expected.read(file)
        if array.shape == expected.shape:
            rows = [array] * len(orders)
        elif array.shape == (len(orders), *expected.shape):
            rows = list(array)
        else:
            raise ConfigError(
                f"--{name.replace('_', '-')} {file}: the array is {array.shape}; an image takes "
                f"{expected.shape}, and {len(orders)} images {(len(orders), *expected.shape)}"
            )
        for own, row in zip(carried, rows, strict=True):
            own[name] = row
    return [replace(order, given=own) for order, own in zip(orders, carried, strict=True)]


def _settings_of(row: "ListedImage", sampling: "S") -> "S":
    """Return the settings of a row: the run's, replaced by its own."""
    try:
        return sampling.changed(row.settings) if row.settings else sampling
    except ConfigError as error:
        raise ConfigError(f"{row.where}: {error}") from error
