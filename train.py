"""`python train.py`: train a model; without arguments, the demo model on the embedded emoji set."""

import dataclasses
import json
import logging
import sys
from pathlib import Path

import click

from nsp.errors import ConfigError, NspError


@click.command()
@click.option(
    "--preset",
    "preset_name",
    default="emoji",
    show_default=True,
    help="Named run: emoji, quick, smoke.",
)
@click.option("--data", default=None, help="'emoji', a .tar, or a folder of captioned pictures.")
@click.option(
    "--output-dir", type=click.Path(path_type=Path), default=None, help="Run folder [runs/PRESET]."
)
@click.option(
    "--steps", type=int, default=None, help="Steps of every phase, instead of the preset's."
)
@click.option("--phase", default=None, help="Stop after this phase.")
@click.option("--seed", type=int, default=None, help="Seed of weights, data order and samples.")
@click.option("--precision", default=None, help="auto, fp32, bf16 or fp16.")
@click.option("--resume", is_flag=True, help="Continue the run in the run folder.")
@click.option(
    "--skip-bad-files", is_flag=True, help="Leave unreadable pictures out instead of stopping."
)
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def main(
    preset_name: str,
    data: str | None,
    output_dir: Path | None,
    steps: int | None,
    phase: str | None,
    seed: int | None,
    precision: str | None,
    resume: bool,
    skip_bad_files: bool,
    verbose: bool,
) -> None:
    """Train tokenizer, then predictor; leaves a checkpoint folder that `nsp export` takes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        from nsp.training.config import RunConfig
        from nsp.training.presets import preset
        from nsp.training.run import train

        folder = output_dir or Path("runs") / preset_name
        stored = folder / "run.json"
        if resume and stored.exists():
            config = RunConfig.from_dict(json.loads(stored.read_text()))
        else:
            config = preset(preset_name)
        if data is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=data))
        if seed is not None:
            config = dataclasses.replace(config, seed=seed)
        if precision is not None:
            config = RunConfig.from_dict({**config.to_dict(), "precision": precision})
        if steps is not None:
            phases = tuple(dataclasses.replace(p, steps=steps) for p in config.phases)
            config = dataclasses.replace(config, phases=phases)
        result = train(
            config, folder, last_phase=phase, resume=resume, skip_bad_files=skip_bad_files
        )
    except NspError as error:
        if verbose:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    if not result.finished:
        click.echo(
            f"stopped; continue with: python train.py --resume --output-dir {folder}", err=True
        )
    click.echo(f"checkpoint: {result.checkpoint}")
    click.echo(f"next: nsp export --checkpoint {result.checkpoint}")
    sys.exit(0 if result.finished else 130)


if __name__ == "__main__":
    main()
