"""`nsp …`: every verb is a thin function: parse, configuration, library call, report."""

import click

from nsp.benchmarks.verbs import bench
from nsp.console.command_line import Program, verbose_option, version_option
from nsp.console.data_verbs import data
from nsp.console.folder_verbs import convert, doctor, inspect
from nsp.console.generate_verb import generate
from nsp.export.plan_verb import plan_size
from nsp.export.verbs import export_engines, verify_engines


@click.group(
    "nsp",
    cls=Program,
    commands=[
        *(export_engines, generate, convert, verify_engines, inspect, doctor, plan_size),
        *(data, bench),
    ],
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Options may also be spelled with underscores.
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@version_option
@verbose_option
@click.pass_context
def main(context: click.Context) -> None:
    """Export, run and measure next-scale image generators. Train one with: python train.py."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


if __name__ == "__main__":
    main()
