"""Random weights of a named size, the same each time: what speed and parity need no training for.

    python -m nsp.benchmarks.random_model --size w512 --output-dir runs/w512
    nsp export --checkpoint runs/w512 --engine-dir engines/w512 --target onnxruntime --fp32 --int8

How the weights are drawn so that all of them matter is each family's own (`Learner.untrained`).
"""

from pathlib import Path
from typing import Any

import click
import torch

from nsp.artifacts.checkpoint import is_checkpoint, read_checkpoint
from nsp.artifacts.systems import save_checkpoint
from nsp.console.common_options import FOLDER
from nsp.errors import ConfigError, NspError
from nsp.family.contract import AnyFamily
from nsp.family.registry import family, family_names

_MADE_BY, _VERSION = "nsp.benchmarks.random_model", 3


def find_size(name: str, family_name: str | None = None) -> tuple[AnyFamily, Any]:
    """Return the family that has a size, and its configuration; the first one where several do.

    A name "FAMILY/SIZE" says which one. Raises ConfigError naming the known sizes.
    """
    if "/" in name and family_name is None:
        family_name, _, name = name.partition("/")
    names = family_names() if family_name is None else [family_name]
    records = [family(each) for each in names]
    for record in records:
        if name in record.sizes:
            return record, record.sizes[name]
    known = "; ".join(f"{record.name}: {', '.join(record.sizes)}" for record in records)
    raise ConfigError(f"unknown size {name!r}; known: {known}")


def random_system(record: AnyFamily, config: Any) -> Any:
    """Return a model of random weights, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return record.learner.untrained(config).eval()


def write_random_model(folder: Path, record: AnyFamily, config: Any) -> None:
    """Write the checkpoint `folder`, unless these weights are there already.

    Raises ConfigError for a folder that holds anything else: nothing trained is replaced.
    """
    notes = {"made_by": _MADE_BY, "version": _VERSION, "size": config.to_dict()}
    if is_checkpoint(folder):
        found = read_checkpoint(folder)
        if found.notes.get("made_by") != _MADE_BY:
            raise ConfigError(f"{folder} has another checkpoint; give a new folder")
        if found.notes == notes and found.family.name == record.name:
            return
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} has other files; give a new folder")
    save_checkpoint(folder, random_system(record, config), notes=notes, sampling={})


@click.command()
@click.option("--size", "name", default="w512", show_default=True, help="Of any family.")
@click.option("--family", "family_name", help="Family of a size that several have.")
@click.option("--output-dir", type=FOLDER, required=True, help="Checkpoint folder to write.")
def main(*, name: str, family_name: str | None, output_dir: Path) -> None:
    """Write a checkpoint of random weights, the same each time."""
    try:
        record, config = find_size(name, family_name)
        write_random_model(output_dir, record, config)
    except NspError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"checkpoint: {output_dir}")
    click.echo(f"next: nsp export --checkpoint {output_dir} --engine-dir engines/{name}")


if __name__ == "__main__":
    main()
