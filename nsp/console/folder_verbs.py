"""`nsp convert` makes a checkpoint folder; `nsp inspect` and `nsp doctor` show what exists."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from nsp.console.command_line import Verb
from nsp.console.common_options import FILE, FOLDER, json_option, read_json, verbose_option
from nsp.console.terminal import print_json, print_tables
from nsp.errors import ConfigError


class ConvertVerb(Verb):
    """A verb with an option for every file that families need."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the verb's own parameters, and the files of all families."""
        from nsp.family.registry import family, family_names

        families = {name: family(name) for name in family_names()}
        files = _options({n: each.published for n, each in families.items()}, FILE)
        more = _options({n: each.published_folders for n, each in families.items()}, FOLDER)
        return [*super().get_params(ctx), *files, *more]


def _options(texts: Mapping[str, Mapping[str, str]], kind: click.Path) -> Iterator[click.Option]:
    """Yield an option for every file; its help says what it is for each family."""
    helps: dict[str, dict[str, list[str]]] = {}  # file -> text -> families that say so
    for name, files in texts.items():
        for file, text in files.items():
            helps.setdefault(file, {}).setdefault(text, []).append(name)
    for file, found in helps.items():
        words = " ".join(f"{text} ({', '.join(names)})" for text, names in found.items())
        yield click.Option([f"--{file}"], type=kind, help=words)


@click.command(cls=ConvertVerb)
@click.option("--family", "family_name", required=True, help="Model family of the weights.")
@click.option("--config", type=FILE, help="JSON with model arguments that the weights do not show.")
@click.option("--output-dir", type=FOLDER, required=True, help="Checkpoint folder to write.")
@verbose_option
def convert(
    *, family_name: str, config: Path | None, output_dir: Path, **files: Path | None
) -> None:
    """Convert published weights to a checkpoint folder."""
    from nsp.family.registry import family
    from nsp.paths import check_output

    check_output(output_dir)
    record = family(family_name)
    given = {name: path for name, path in files.items() if path is not None}
    given = {name.replace("_", "-"): path for name, path in given.items()}
    known = {**record.published, **record.published_folders}
    for name in (*record.published, *given):
        if name not in given:
            raise ConfigError(f"--{name} is missing: {record.published[name]}")
        if name not in known:
            raise ConfigError(f"--{name} is not a file that family {family_name} needs; omit it")
    record.convert(given, None if config is None else read_json(config), output_dir)
    click.echo(f"checkpoint: {output_dir}")
    click.echo(f"next: nsp export --checkpoint {shlex.quote(str(output_dir))}")


@click.command(cls=Verb)
@click.argument("folder", type=FOLDER)
@click.option(
    "--all", "everything", is_flag=True, help="Show tensors, profiles and errors of every stage."
)
@json_option
@verbose_option
def inspect(*, folder: Path, everything: bool, as_json: bool) -> None:
    """Show the description stored in an engine or checkpoint folder."""
    from nsp.console.inspection import describe_folder, render_folder

    found = describe_folder(folder)
    if as_json:
        print_json(found)
    else:
        print_tables(render_folder(found, everything=everything))


@click.command(cls=Verb)
@json_option
@verbose_option
def doctor(*, as_json: bool) -> None:
    """Show what works on this machine and what to install.

    Lists every backend, whether it works and why, and the missing optional packages. Changes
    nothing.
    """
    from nsp.console.doctor import examine, render_findings

    found = examine()
    if as_json:
        print_json(found)
    else:
        print_tables(render_findings(found))
