"""`nsp bench` and its verbs: run, compare, fidelity, training, loader, levels."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nsp.benchmarks.contest.names import NAMES
from nsp.console.command_line import OTHER_OPTIONS, Grouped, OneLineErrors, Verb, group
from nsp.console.common_options import (
    COUNT,
    FOLDER,
    backend_option,
    checkpoint_option,
    engine_dir_option,
    json_option,
    one_precision,
    output_dir_option,
    precision_options,
    seed_option,
    threads_option,
    verbose_option,
)
from nsp.console.terminal import print_json
from nsp.errors import ConfigError, RegressionError
from nsp.family.registry import BUILT_IN
from nsp.paths import check_output

# Earlier spellings: options of `nsp bench` that are verbs now.
_VERB_OF = {"--compare": "compare", "--fidelity": "fidelity"}
_PEERS = ("--peer", *(f"--peer-{name}" for name in BUILT_IN))


class Benchmarks(Grouped, OneLineErrors, click.Group):
    """`nsp bench`: without a verb it is `nsp bench run`."""

    command_class = Verb

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with earlier spellings as the verbs they have become."""
        for flag, verb in _VERB_OF.items():
            if flag in args:
                args = [verb, *(arg for arg in args if arg != flag)]
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise self.misplaced("run", error) from error

    def option_groups(self, ctx: click.Context) -> dict[str, list[click.Parameter]]:
        """Return the groups of `nsp bench run`, whose options these are."""
        return run_contest.option_groups(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then the verbs."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def misplaced(self, verb: str, error: click.NoSuchOption) -> Exception:
        """Return the error for an option that a verb does not have: it may be another verb's."""
        takers = [
            name
            for name, command in self.commands.items()
            if any(error.option_name in parameter.opts for parameter in command.params)
        ]
        if not takers:
            return error
        return ConfigError(
            f"{error.option_name} has no effect here: it is for nsp bench {' and '.join(takers)}; "
            f"omit it with nsp bench {verb}"
        )


class BenchVerb(Verb):
    """A verb of `nsp bench`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an option of another verb is named as such."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise bench.misplaced(self.name or "", error) from error


@click.command("run", cls=BenchVerb)
@group("What is measured")
@engine_dir_option
@checkpoint_option("Baseline to compare with.  [default: the source of the engines]")
@backend_option
@precision_options("Measure the {} engines instead of those that suit the device best.")
@threads_option("CPU threads for engines and PyTorch.")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=COUNT,
    multiple=True,
    default=(1, 4),
    show_default=True,
    help="Images per call. Repeatable.",
)
@group("Beside it")
@click.option(
    "--contender",
    "--rival",
    "contenders",
    multiple=True,
    type=click.Choice(NAMES),
    help="Also time this in the same rounds; a precision or backend means the folder's engines "
    "in it. Repeatable.  [default: all, or none with --quick]",
)
@click.option(
    *_PEERS,
    "peer",
    type=FOLDER,
    help="Also time the public code of the same kind of model in this clone, with the same shapes.",
)
@group("How much")
@click.option("--quick", is_flag=True, help="Fewer rounds: a first impression in a minute.")
@click.option("--rounds", type=COUNT, help="Measured calls of each side per batch size, at most.")
@click.option(
    "--sweep",
    is_flag=True,
    help="Also measure batch sizes 1 to 8 with 1 and 2 threads, and guidance that ends early.",
)
@seed_option("Seed of the images made.")
@group(OTHER_OPTIONS)
@output_dir_option("outputs/bench", "Folder for bench.json, bench.md and bench.html.")
@json_option
@verbose_option
def run_contest(
    *,
    engine_dir: Path | None,
    as_json: bool,
    contenders: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure speed, memory and parity of engines beside PyTorch and other contenders."""
    check_output(options["output_dir"])
    from nsp.benchmarks.contest.measure import run
    from nsp.benchmarks.options import BenchOptions
    from nsp.console.terminal import progress_bar, results_console

    precision = one_precision(options)
    bench_options = BenchOptions(
        engine_dir=engine_dir or Path("engines"),
        precision=precision,
        contenders=contenders or None,
        **options,
    )
    with progress_bar() as show:
        report = run(bench_options, on_event=lambda e: show(e.activity, e.done, e.total))
    if as_json:
        click.echo(report.summary_json())
        return
    report.render(results_console())
    click.echo(f"report: {report.markdown_path}")
    click.echo(f"data: {report.json_path}")
    if report.page_path is not None:
        click.echo(f"page: {report.page_path}")


@click.command("compare", cls=BenchVerb)
@click.argument("old", type=FOLDER)
@click.argument("new", type=FOLDER)
@click.option("--threshold", default="5%", show_default=True, help="Allowed slowdown.")
@click.option("--anyway", is_flag=True, help="Compare results that cannot be trusted, too.")
@json_option
@verbose_option
def compare(*, old: Path, new: Path, threshold: str, anyway: bool, as_json: bool) -> None:
    """Compare two results: exit 1 if the engines became slower, 2 if nobody can tell.

    OLD and NEW are bench.json files, or folders that nsp bench has written.
    """
    from nsp.benchmarks.record.compare import compare_results, parse_threshold
    from nsp.benchmarks.record.result import read_result
    from nsp.benchmarks.render.comparison import comparison_sections
    from nsp.benchmarks.render.report import render
    from nsp.console.terminal import results_console

    share = parse_threshold(threshold)
    results = read_result(old), read_result(new)
    found = compare_results(*results, threshold=share, anyway=anyway)
    if as_json:
        print_json({**found.to_dict(), "verdicts": found.verdicts})
    else:
        render(comparison_sections(found), results_console())
    if found.slower:
        sizes = ", ".join(map(str, found.slower))
        raise RegressionError(f"slower than {old} by more than {share:.1%} at batch size {sizes}")


@click.command("fidelity", cls=BenchVerb)
@engine_dir_option
@checkpoint_option("Checkpoint with the tokenizer.  [default: the source of the engines]")
@backend_option
@precision_options("Measure the {} engines instead of those that suit the device best.")
@click.option(
    "--num-captions",
    type=COUNT,
    default=200,
    show_default=True,
    help="Captions of each split.",
)
@click.option("--data", default="emoji", show_default=True, help="Captioned pictures.")
@click.option(
    "--guidance-until",
    type=click.IntRange(0),
    metavar="SCALES",
    help="Guide only the first SCALES scales.",
)
@seed_option("Seed of the images made.")
@output_dir_option("outputs/bench", "Folder for fidelity.json, fidelity.md and fidelity.png.")
@json_option
@verbose_option
def fidelity(*, engine_dir: Path | None, data: str, as_json: bool, **options: Any) -> None:
    """Measure whether pictures show the content of their prompts."""
    check_output(options["output_dir"])
    from nsp.benchmarks.fidelity.measure import FidelityOptions, run
    from nsp.console.terminal import progress_bar

    precision = one_precision(options)
    chosen = FidelityOptions(
        engine_dir=engine_dir or Path("engines"), source=data, precision=precision, **options
    )
    with progress_bar() as show:
        result = run(chosen, on_step=lambda name, done, total: show(name, done, total))
    if as_json:
        print_json(result.to_dict())
        return
    for split in result.splits:
        click.echo(f"{split.name}: recall@1 {split.recall_at_1}, recall@5 {split.recall_at_5}")
        if split.reconstruction_at_1 is not None:
            click.echo(
                f"  tokenizer: recall@1 {split.reconstruction_at_1}, "
                f"median PSNR {split.reconstruction_psnr_db:.1f} dB"
            )
    click.echo(f"report: {chosen.output_dir / 'fidelity.md'}")
    click.echo(f"contact sheet: {chosen.output_dir / 'fidelity.png'}")


@click.command("training", cls=BenchVerb)
@click.option("--preset", default="emoji", show_default=True)
@click.option("--phase", "phases", multiple=True, help="Repeatable.  [default: all]")
@click.option("--steps", type=COUNT, default=40, show_default=True, help="Steps of each.")
@click.option(
    "--size", "sizes", multiple=True, help="Named model instead of the preset's. Repeatable."
)
@click.option("--batch-size", type=COUNT, help="Pictures of a step.  [default: the preset's]")
@click.option("--uncached", is_flag=True, help="Mirror pictures, so that they are read every step.")
@json_option
@verbose_option
def training(
    *, preset: str, phases: tuple[str, ...], steps: int, as_json: bool, **options: Any
) -> None:
    """Measure the trainer's steps beside those of a plain PyTorch loop of the same model."""
    from nsp.benchmarks.rates.training import measure_phases

    found = []
    for each in measure_phases(preset, phases, steps=steps, **options):
        found.append(each)
        if not as_json:
            click.echo(each.words)
    if as_json:
        print_json([each.to_dict() for each in found])


@click.command("loader", cls=BenchVerb)
@click.option("--source", default="emoji", show_default=True, help="Source, as for nsp data.")
@click.option("--image-size", type=COUNT, default=64, show_default=True, help="Pixels.")
@click.option("--batch-size", type=COUNT, default=64, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(0),
    multiple=True,
    default=(0, 2),
    show_default=True,
    help="Worker processes. Repeatable.",
)
@click.option("--seconds", type=float, default=5.0, show_default=True, help="For each loader.")
@click.option("--consumption", type=float, help="Images per second that the model takes.")
@json_option
@verbose_option
def loader(*, source: str, image_size: int, as_json: bool, **options: Any) -> None:
    """Measure the images per second that the data loaders give."""
    from nsp.benchmarks.rates.loader import measure, section
    from nsp.benchmarks.render.report import render
    from nsp.console.terminal import results_console

    report = measure(source, image_size_px=image_size, **options)
    if as_json:
        print_json(report.to_dict())
    else:
        render([section(report)], results_console())


@click.command("levels", cls=BenchVerb)
@click.option("--family", "family_name", required=True, help="Family that draws codes in order.")
@click.option("--size", required=True, help="Size of the model.")
@click.option("--epochs", type=COUNT, default=300, show_default=True, help="Epochs of the run.")
@click.option(
    "--epoch-rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="End of every level over that of the next one.",
)
@json_option
@verbose_option
def levels(*, family_name: str, size: str, epochs: int, epoch_rate: float, as_json: bool) -> None:
    """Count what training costs with levels of patches (--patch-level 1 to 4)."""
    from nsp.benchmarks.patch_levels import costs, flop_per_picture

    flop = flop_per_picture(family_name, size, (1, 2, 4, 8))
    found = costs(flop, levels=(1, 2, 3, 4), epochs=epochs, epoch_rate=epoch_rate)
    if as_json:
        print_json(
            {"flop_per_picture": {str(side): flop[side] for side in flop}}
            | {"levels": [dataclasses.asdict(each) for each in found]}
        )
        return
    for side, count in flop.items():
        click.echo(f"patches {side} codes wide: {count / 1e9:.1f} GFLOP per picture")
    for each in found:
        epochs_of = ", ".join(f"{count} of {side}" for side, count in each.sides.items())
        click.echo(
            f"patch level {each.patch_level}: {each.relative:.3f} of the cost of codes alone "
            f"(by tokens {each.of_tokens:.3f}); epochs: {epochs_of}"
        )


def _without_verb(**options: Any) -> None:
    """Run the contest; refuse its options before another verb, which would not read them."""
    from nsp.console.terminal import logs_on_stderr

    context = click.get_current_context()
    if context.invoked_subcommand is None:
        with logs_on_stderr(verbose=context.obj.verbose):
            _body(run_contest)(**options)
        return
    for parameter in run_contest.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is click.core.ParameterSource.COMMANDLINE:
            raise ConfigError(
                f"{parameter.opts[0]} is before {context.invoked_subcommand}, which would not "
                "read it; give options after the verb"
            )


def _body(command: click.Command) -> Callable[..., Any]:
    assert command.callback is not None
    return command.callback


def program(verb: str) -> None:
    """Run a verb as a program of its own, for `python -m nsp.benchmarks.VERB`."""
    import sys

    bench.main([verb, *sys.argv[1:]], prog_name="nsp bench")


bench = Benchmarks(
    "bench",
    commands=[run_contest, compare, fidelity, training, loader, levels],
    params=run_contest.params,
    callback=_without_verb,
    invoke_without_command=True,
    help="Measure engines, of any family and device. Without a verb: the same as run.",
)
