"""Random weights of a named size, the same each time: what speed and parity need no training for.

    python -m nsp.benchmarks.random_model --size w512 --output-dir runs/w512
    nsp export --checkpoint runs/w512 --engine-dir engines/w512 --target onnxruntime --fp32 --int8

The published initialisation would make parity blind: it all but closes the gates of the residual
branches, hardly uses the class, and leaves logits almost constant. Here all of it matters.
"""

from pathlib import Path

import click
import torch
from torch import nn

from nsp.artifacts.checkpoint import is_checkpoint, read_checkpoint
from nsp.artifacts.systems import save_checkpoint
from nsp.console.command_line import FOLDER
from nsp.errors import ConfigError, NspError
from nsp.families.var.config import SIZES, ClassCondition, VarConfig, size, with_condition
from nsp.families.var.model import initialize
from nsp.families.var.system import VarSystem
from nsp.family.registry import family
from nsp.text.parts import TextEncoderSettings

FAMILY = "var"
_NOTES = {"made_by": "nsp.benchmarks.random_model", "version": 2}
# Gates of about 0.3 where the published start has 1e-5: without the branches, two thirds of what
# decides the logits are gone.
_ADALN_GAMMA = 1.0
# Logits of standard deviation 9: of 4096 codes about three are likely. Were they nearly flat, the
# smallest rounding would flip tokens (std 3: 3 % of them in fp16), unlike in a trained model. Of
# w512 in int8 logits are off by 1.7 % of their range, and 91 % of the worst scale's tokens stay.
_HEAD = 15.0


def random_config(name: str) -> VarConfig:
    """Return the class-conditional configuration of a size; ConfigError names the known ones."""
    config = size(name)
    if config.text is None:
        return config
    return with_condition(config, ClassCondition(num_classes=10))


def random_system(config: VarConfig) -> VarSystem:
    """Return a model of random weights, the same each time, in which every weight matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system: VarSystem = family(FAMILY).learner.new_system(config, TextEncoderSettings(), None)
        initialize(system.predictor, adaln_gamma=_ADALN_GAMMA, head=_HEAD)
        nn.init.normal_(system.predictor.class_emb.weight)
    return system.eval()


def write_random_model(folder: Path, config: VarConfig) -> None:
    """Write the checkpoint `folder`, unless these weights are there already.

    Raises ConfigError for a folder that holds anything else: nothing trained is replaced.
    """
    if is_checkpoint(folder):
        record = read_checkpoint(folder)
        if record.notes.get("made_by") != _NOTES["made_by"]:
            raise ConfigError(f"{folder} has another checkpoint; give a new folder")
        if record.notes == _NOTES and record.config == config.to_dict():
            return
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} has other files; give a new folder")
    save_checkpoint(folder, random_system(config), notes=_NOTES, sampling={})


@click.command()
@click.option("--size", "name", default="w512", show_default=True, help=", ".join(SIZES))
@click.option("--output-dir", type=FOLDER, required=True, help="Checkpoint folder to write.")
def main(*, name: str, output_dir: Path) -> None:
    """Write a class-conditional checkpoint of random weights, the same each time."""
    try:
        write_random_model(output_dir, random_config(name))
    except NspError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"checkpoint: {output_dir}")
    click.echo(f"next: nsp export --checkpoint {output_dir} --engine-dir engines/{name}")


if __name__ == "__main__":
    main()
