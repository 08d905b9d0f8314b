"""`nsp bench`: timing, comparison of two results, and fidelity of pictures."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from nsp.console.command_line import (
    COUNT,
    FILE,
    FOLDER,
    PRECISIONS,
    Verb,
    backend_option,
    checkpoint_option,
    engine_dir_option,
    json_option,
    one_precision,
    output_dir_option,
    precision_options,
    print_json,
    seed_option,
    threads_option,
    verbose_option,
)
from nsp.errors import ConfigError, RegressionError
from nsp.paths import check_output

# What the two other uses read; the timing takes everything that is not theirs alone.
_OF_USES = {
    "--compare": {"compare", "threshold", "as_json", "verbose"},
    "--fidelity": {
        *("fidelity", "num_captions", "data", "guidance_until"),
        *("engine_dir", "checkpoint", "backend", "seed", "output_dir", "as_json", "verbose"),
        *PRECISIONS,
    },
}
_THEIRS_ALONE = {"compare", "threshold", "fidelity", "num_captions", "data", "guidance_until"}


@click.command(cls=Verb)
@engine_dir_option
@checkpoint_option("Baseline to compare with.  [default: the source of the engines]")
@backend_option
@precision_options("Measure the {} engines instead of those that suit the device best.")
@threads_option("CPU threads for engines and PyTorch.")
@click.option("--quick", is_flag=True, help="Fewer rounds: a first impression in a minute.")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=COUNT,
    multiple=True,
    default=(1, 4),
    show_default=True,
    help="Images per call. Repeatable.",
)
@click.option("--rounds", type=COUNT, help="Measured calls of each side per batch size, at most.")
@click.option(
    "--rival",
    "rivals",
    multiple=True,
    type=click.Choice(["torch.compile", "plain-onnx", *PRECISIONS]),
    help="Also time this in the same rounds; a precision means the folder's engines in it. "
    "Repeatable.  [default: all, or none with --quick]",
)
@click.option(
    "--peer-var",
    type=FOLDER,
    help="Also time the public VAR code in this clone, with the same shapes.",
)
@click.option(
    "--sweep",
    is_flag=True,
    help="Also measure batch sizes 1 to 8 with 1 and 2 threads, and guidance that ends early.",
)
@click.option(
    "--compare",
    type=(FILE, FILE),
    metavar="OLD NEW",
    help="Compare two bench.json files instead; exit 1 if the engines became slower.",
)
@click.option(
    "--threshold",
    default="5%",
    show_default=True,
    help="Allowed slowdown, for --compare.",
)
@click.option(
    "--fidelity",
    is_flag=True,
    help="Measure instead whether pictures show the content of their prompts.",
)
@click.option(
    "--num-captions",
    type=COUNT,
    default=200,
    show_default=True,
    help="Captions of each split, for --fidelity.",
)
@click.option(
    "--data", default="emoji", show_default=True, help="Captioned pictures, for --fidelity."
)
@click.option(
    "--guidance-until",
    type=click.IntRange(0),
    metavar="SCALES",
    help="Guide only the first SCALES scales, for --fidelity.",
)
@seed_option("Seed of the images made.")
@output_dir_option("outputs/bench", "Folder for bench.json, bench.md and bench.html.")
@json_option
@verbose_option
def bench(
    *,
    engine_dir: Path | None,
    as_json: bool,
    fidelity: bool,
    num_captions: int,
    data: str,
    guidance_until: int | None,
    compare: tuple[Path, Path] | None,
    threshold: str,
    rivals: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure speed, memory and parity of engines and PyTorch, or the fidelity of pictures."""
    _refuse_options_of_other_uses(
        "--compare" if compare is not None else "--fidelity" if fidelity else None
    )
    if compare is not None:
        _compare_results(*compare, threshold=threshold, as_json=as_json)
        return
    check_output(options["output_dir"])
    from nsp.benchmarks.contest.measure import run
    from nsp.benchmarks.options import BenchOptions
    from nsp.console.terminal import progress_bar, results_console

    precision = one_precision(options)
    folder = engine_dir or Path("engines")
    if fidelity:
        kept = ("output_dir", "checkpoint", "backend", "seed")
        _measure_fidelity(
            as_json=as_json,
            engine_dir=folder,
            precision=precision,
            source=data,
            num_captions=num_captions,
            guidance_until=guidance_until,
            **{name: options[name] for name in kept},
        )
        return
    bench_options = BenchOptions(
        engine_dir=folder, precision=precision, rivals=rivals or None, **options
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


def _refuse_options_of_other_uses(use: str | None) -> None:
    """Raise ConfigError for an option given that `use` would not read; None is the timing."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        allowed = name not in _THEIRS_ALONE if use is None else name in _OF_USES[use]
        if allowed:
            continue
        given = parameter.opts[0]
        takers = [other for other, names in _OF_USES.items() if name in names]
        belongs = f"it is for {' and '.join(takers)}" if use is None else f"omit it with {use}"
        raise ConfigError(f"{given} has no effect here: {belongs}")


def _compare_results(old: Path, new: Path, *, threshold: str, as_json: bool) -> None:
    """Say how two results differ; end with an error when the engines became slower."""
    from nsp.benchmarks.record.compare import compare_results, comparison_sections, parse_threshold
    from nsp.benchmarks.record.result import read_result
    from nsp.benchmarks.render.report import render
    from nsp.console.terminal import results_console

    share = parse_threshold(threshold)
    found = compare_results(read_result(old), read_result(new), threshold=share)
    if as_json:
        print_json({**found.to_dict(), "verdicts": found.verdicts})
    else:
        render(comparison_sections(found), results_console())
    if found.slower:
        sizes = ", ".join(map(str, found.slower))
        raise RegressionError(f"slower than {old} by more than {share:.1%} at batch size {sizes}")


def _measure_fidelity(*, as_json: bool, **options: Any) -> None:
    """Measure and report."""
    from nsp.benchmarks.fidelity.measure import FidelityOptions, run
    from nsp.console.terminal import progress_bar

    chosen = FidelityOptions(**options)
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
