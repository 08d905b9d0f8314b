"""`nsp plan` says what a model will take before it is trained, exported or run."""

from typing import TYPE_CHECKING

import click

from nsp.console.command_line import Verb
from nsp.console.common_options import COUNT, PRECISIONS, json_option, verbose_option
from nsp.console.terminal import print_json, print_tables
from nsp.export.devices import DEVICES
from nsp.export.size_table import in_words

if TYPE_CHECKING:
    from rich.table import Table

    from nsp.export.size_plan import SizePlan


@click.command("plan", cls=Verb)
@click.argument("model", metavar="CHECKPOINT|FAMILY/SIZE")
@click.option("--batch", type=COUNT, default=1, show_default=True, help="Images at once.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Of the weights.",
)
@click.option(
    "--device",
    type=click.Choice(list(DEVICES)),
    default="cpu",
    show_default=True,
    help="Where it would run.",
)
@json_option
@verbose_option
def plan_size(*, model: str, batch: int, precision: str, device: str, as_json: bool) -> None:
    """Show the memory, operations and least time of a model, without making it.

    Give a checkpoint folder or a named size. Nothing is loaded or trained: only shapes are
    computed, so that a model larger than this machine can be planned on it.
    """
    from nsp.export.size_plan import plan_model

    plan = plan_model(model, batch=batch, precision=precision, on=device)
    if as_json:
        print_json(plan.to_dict())
        return
    print_tables([_generation(plan), _training(plan)])
    click.echo("docs/plan.md says what is counted, and how near it is to what was measured")


def _generation(plan: "SizePlan") -> "Table":
    """Return what a batch of images takes."""
    device = plan.device
    floor = "unknown" if plan.floor_ms is None else f"{plan.floor_ms:,.2f} ms"
    fits = ""
    if device.memory_gb is not None:
        fits = f"{'fits' if plan.fits else 'does not fit'} {device.memory_gb:g} GB"
    return _table(
        f"{plan.model}, {plan.precision}, batch {plan.batch}, {device.name}",
        [
            ("weights", in_words(plan.weights), f"{plan.num_weights / 1e6:,.1f} million"),
            ("KV arena", in_words(plan.arena), ""),
            ("scratch", in_words(plan.scratch), "tensors between and in stages, widest moment"),
            ("peak", in_words(plan.peak), fits),
            ("operations", f"{plan.flop / 1e9:,.1f} GFLOP", "of the whole batch"),
            ("bytes moved", in_words(plan.moved), "weights of every call, inputs, outputs"),
            ("least time", floor, device.source),
            ("engine folder", in_words(plan.folder), "weights, and 256 KiB a graph"),
            ("export", f"about {plan.export_s:,.0f} s", "to ONNX, on one core"),
        ],
    )


def _training(plan: "SizePlan") -> "Table":
    """Return what each phase of a training takes."""
    rows = [
        (
            each.name,
            in_words(each.memory.total),
            f"batch {each.batch_size}: weights {in_words(each.memory.weights)}, gradients "
            f"{in_words(each.memory.gradients)}, optimizer {in_words(each.memory.optimizer)}, "
            f"average {in_words(each.memory.average)}, activations "
            f"{in_words(each.memory.activations)}",
        )
        for each in plan.training
    ]
    return _table(f"training memory in float32, phases of {plan.recipe}", rows)


def _table(title: str, rows: "list[tuple[str, str, str]]") -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
