"""`nsp …`: every verb is a thin function: parse, configuration, library call, report."""

import click

from nsp.console.command_line import Program, Verbs
from nsp.console.common_options import verbose_option, version_option

VERBS = Verbs(
    train="nsp.console.train_command:main",
    export="nsp.export.verbs:export_engines",
    generate="nsp.console.generate_verb:generate",
    evaluate="nsp.console.evaluate_verb:evaluate",
    convert="nsp.console.folder_verbs:convert",
    verify="nsp.export.verbs:verify_engines",
    inspect="nsp.console.folder_verbs:inspect",
    doctor="nsp.console.folder_verbs:doctor",
    plan="nsp.export.plan_verb:plan_size",
    data="nsp.console.data_verbs:data",
    bench="nsp.benchmarks.verbs:bench",
    **{"clip-score": "nsp.console.clip_score_verb:clip_score"},
)


@click.group(
    "nsp",
    cls=Program,
    commands=VERBS,
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
    """Train, export, run and measure next-scale image generators."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


if __name__ == "__main__":
    main()
