"""`nsp evaluate`: two archives of pictures become FID, sFID, IS, precision and recall."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nsp.console.command_line import Verb
from nsp.console.common_options import (
    COUNT,
    FILE,
    FOLDER,
    threads_option,
    torch_threads,
    verbose_option,
)
from nsp.console.terminal import print_json, print_tables

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from nsp.evaluation.evaluate import Evaluation

_STDOUT = Path("-")


@click.command(cls=Verb)
@click.argument("reference", type=FILE, metavar="REF.npz")
@click.argument("sample", type=FILE, metavar="SAMPLE.npz")
@click.option(
    "--inception",
    type=FILE,
    help="The ADM evaluator's classify_image_graph_def.pb, or torch-fidelity's weights "
    "pt_inception-2015-12-05-6726825d.pth (not comparable with published figures).",
)
@click.option("--batch-size", type=COUNT, default=32, show_default=True, help="Pictures at once.")
@click.option("--device", help="cpu or cuda.  [default: a GPU if there is one]")
@threads_option("CPU threads.")
@click.option(
    "--json",
    "json_file",
    type=FOLDER,
    is_flag=False,
    flag_value=_STDOUT,
    metavar="[FILE]",
    help="Write the result as JSON to a file; without one, print it instead of the table.",
)
@verbose_option
def evaluate(
    *,
    reference: Path,
    sample: Path,
    inception: Path | None,
    batch_size: int,
    device: str | None,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Compare generated pictures with a reference, by the definition of the ADM evaluator.

    Both are .npz files with uint8 pictures (N, H, W, 3) as arr_0, as nsp generate --npz writes
    them; the reference may have precomputed statistics, as ADM's reference archives do. Without
    --inception there is no figure; docs/evaluate.md says which file is needed and where it is.
    """
    from nsp.console.terminal import progress_bar
    from nsp.evaluation.evaluate import evaluate as compute
    from nsp.evaluation.features import load_features
    from nsp.files import file_sha256, write_file

    chosen = chosen_device(device)
    with progress_bar() as show, torch_threads(threads):
        features = load_features(inception, chosen)
        found = compute(
            reference, sample, features, batch_size=batch_size, device=chosen, on_progress=show
        )
    values = {"reference": str(reference), "sample": str(sample), **found.to_dict()}
    if inception is not None:
        values |= {"inception": str(inception), "inception_sha256": file_sha256(inception)}
    if json_file == _STDOUT:
        print_json(values)
        return
    if json_file is not None:
        with write_file(json_file) as partial:
            partial.write_text(json.dumps(values, indent=1) + "\n")
    print_tables([_table(found)])
    click.echo(origin(found))
    if json_file is not None:
        click.echo(f"data: {json_file}")


def chosen_device(wanted: str | None) -> "torch.device":
    """Return where to compute: the wanted device, or a GPU if there is one."""
    import torch

    from nsp.backends.torch import usable_device

    return usable_device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def origin(found: "Evaluation") -> str:
    """Return in one line what the figures were computed from, and whether they can be compared."""
    references = f"{found.num_references:,} references" if found.num_references else "statistics"
    words = [f"{found.num_samples:,} samples", references, found.features]
    if found.statistics == "precomputed" and found.num_references:
        words.append("FID and sFID from the reference's precomputed statistics")
    if not found.is_comparable:
        words.append("not comparable with published figures")
    return ", ".join(words)


def _table(found: "Evaluation") -> "Table":
    """Return the figures as a table."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("better")
    missing = "needs the ADM evaluator's graph, and mu_s and sigma_s in a reference with mu"
    rows = (
        ("FID", found.fid, ".3f", "lower", ""),
        ("sFID", found.sfid, ".3f", "lower", missing),
        ("inception score", found.inception_score, ".2f", "higher", ""),
        ("precision", found.precision, ".4f", "higher", "needs pictures in the reference"),
        ("recall", found.recall, ".4f", "higher", "needs pictures in the reference"),
    )
    for name, value, form, better, why in rows:
        if value is None:
            table.add_row(name, "-", why)
        else:
            table.add_row(name, format(value, form), better)
    return table
