"""The options of every run of `python train.py`, the end of a run, and its final report."""

import json
import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nsp.console.command_line import (
    DONE,
    INTERRUPTED,
    OTHER_OPTIONS,
    drop_unwritten,
    explain,
    group,
    open_standard_streams,
)
from nsp.console.common_options import COUNT, FOLDER
from nsp.console.train_options import TrainCommand
from nsp.errors import ConfigError, one_line

if TYPE_CHECKING:
    from nsp.family.recipe import RunConfig

logger = logging.getLogger(__name__)

SCALE = click.IntRange(min=0)


def _print_schema(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from nsp.family.recipe_schema import run_schema

        click.echo(json.dumps(run_schema(), indent=1))
        context.exit()


def _one_of(*words: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return a completion of these words; wrong ones are refused with the nearest, later."""
    return lambda ctx, parameter, begun: [word for word in words if word.startswith(begun)]


def _preset_names(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    from nsp.family.recipes import recipes

    return [name for name in recipes() if name.startswith(begun.replace("-", "_"))]


def _size_names(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    from nsp.family.registry import family, family_names

    known = dict.fromkeys(size for name in family_names() for size in family(name).sizes)
    return [size for size in known if size.startswith(begun)]


@click.command(
    "train",
    cls=TrainCommand,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@group("Run")
@click.option(
    "--preset",
    "--recipe",
    "preset",
    shell_complete=_preset_names,
    help="Named run, such as emoji, quick, next-scale; with --help, its options.  [default: "
    "finetune with --data, otherwise emoji]",
)
@click.option(
    "--config",
    type=FOLDER,
    help="YAML or JSON file with a run's configuration, instead of a preset.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="PLACE=VALUE",
    help="Change one value of the run, such as predictor.optimizer.lr=1e-3. Repeatable.",
)
@click.option(
    "--size",
    shell_complete=_size_names,
    help="Named model of the family, such as d16, instead of the recipe's.",
)
@click.option("--print-config", is_flag=True, help="Print the run as YAML for --config, and exit.")
@click.option(
    "--json-schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON Schema of a run's configuration, and exit.",
)
@group("Data")
@click.option(
    "--data", "--data-dir", help="'emoji', a .tar, a folder, hf:NAME_OR_FOLDER, or shards."
)
@click.option("--val-dir", help="Pictures to validate on, instead of the held-out ones.")
@click.option(
    "--val-share",
    type=float,
    help="Share of the pictures to validate on, such as 0.05, if they have no validation split.",
)
@click.option("--num-workers", type=SCALE, help="Processes that read pictures ahead.")
@click.option(
    "--stream",
    is_flag=True,
    default=None,
    help="Read --data (shards, paths or URLs) as a stream.",
)
@click.option("--token-cache", help="File with the pictures' tokens, made by nsp data cache.")
@click.option("--skip-bad-files", is_flag=True, help="Leave out bad pictures instead of stopping.")
@group("Training")
@click.option("--steps", type=int, help="Steps of every phase, instead of the preset's numbers.")
@click.option("--epochs", type=COUNT, help="Epochs of every phase, instead of steps.")
@click.option("--batch-size", type=COUNT, help="Pictures per step, over all devices.")
@click.option("--learning-rate", type=float, help="Peak learning rate of every phase.")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), help="Seed of weights, data order and samples."
)
@click.option("--text-encoder", help="Pretrained CLIP or pipeline folder to start from.")
@click.option("--start-from", help="Checkpoint folder with the weights to start from.")
@click.option("--phase", help="Stop after this phase.")
@click.option("--from-phase", help="Skip the phases before this one (needs --start-from).")
@group("Device")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="[default: a GPU if there is one]"
)
@click.option(
    "--precision",
    shell_complete=_one_of("auto", "fp32", "bf16", "fp16"),
    help="auto, fp32, bf16 or fp16.",
)
@click.option("--fp16", is_flag=True, help="The same as --precision fp16.")
@click.option(
    "--parallel",
    shell_complete=_one_of("ddp", "fsdp"),
    help="How several processes share the work (ddp or fsdp).",
)
@click.option("--compile/--no-compile", default=None, help="Use torch.compile.")
@click.option(
    "--activation-checkpointing/--no-activation-checkpointing",
    default=None,
    help="Recompute activations to save memory.",
)
@group("Folders and records")
@click.option(
    "--output-dir",
    type=FOLDER,
    help="Run folder, also for samples.  [default: the preset's, or runs/PRESET, or runs/NAME of "
    "FILE]",
)
@click.option("--checkpoint-dir", help="Folder for saved steps.  [default: in the run folder]")
@click.option("--log-dir", help="Folder for TensorBoard files.  [default: in the run folder]")
@click.option("--save-every", type=COUNT, help="Epochs between saved steps.")
@click.option("--validate-every", type=COUNT, help="Epochs between validations.")
@click.option("--mlflow", help="Record to MLflow: 'local', a folder, or a server's URI.")
@click.option(
    "--log-with",
    multiple=True,
    help="Record also with a tracker of accelerate: wandb, comet_ml, aim, ... Repeatable.",
)
@group("Continuing a run")
@click.option("--resume", is_flag=True, help="Continue the run in the run folder.")
@click.option(
    "--resume-from",
    type=FOLDER,
    help="Continue the run of this folder, which may be inside the run folder.",
)
@click.option("--accept-changed-data", is_flag=True, help="Resume although the data has changed.")
@click.option(
    "--anyway",
    is_flag=True,
    default=None,
    help="Go on although a phase's result is not good enough to build on.",
)
@group(OTHER_OPTIONS)
@click.option("--verbose", is_flag=True, help="Log details, and show tracebacks of errors.")
def main(
    preset: str | None,
    output_dir: Path | None,
    phase: str | None,
    resume: bool,
    resume_from: Path | None,
    accept_changed_data: bool,
    skip_bad_files: bool,
    print_config: bool,
    verbose: bool,
    device: str | None,
    fp16: bool,
    **changes: Any,
) -> None:
    """Train phase after phase; the result is a checkpoint folder for `nsp export`."""
    folder = output_dir or Path("runs")
    try:
        open_standard_streams()
        from nsp.console.train_config import configure

        folder = _folder(preset, changes, output_dir)
        if resume_from is not None:
            folder, resume = run_of(resume_from, output_dir), True
        if fp16:
            if changes["precision"] not in (None, "fp16"):
                raise ConfigError(
                    f"--fp16 and --precision {changes['precision']} are both given; choose one"
                )
            changes["precision"] = "fp16"
        run = configure(preset, folder if resume else None, **changes)
        if print_config:
            from nsp.console.run_files import as_yaml

            click.echo(as_yaml(run), nl=False)
            return
        if preset is None and changes["config"] is None and not resume:
            _say_default(changes)
        from nsp.training.whole_run import train

        result = train(
            run,
            folder,
            last_phase=phase,
            resume=resume,
            skip_bad_files=skip_bad_files,
            device=device,
            accept_changed_data=accept_changed_data,
        )
    except KeyboardInterrupt:  # between steps: in imports, data, checkpoints
        if (folder / "run.json").is_file():
            click.echo(_stopped(folder, phase, skip_bad_files), err=True)
        else:
            click.echo("stopped before the first step; repeat the command to start again", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        message, code = explain(error)
        if verbose:
            traceback.print_exc()
        click.echo("error: " + one_line(" ".join(message.split())), err=True)
        drop_unwritten()
        sys.exit(code)
    if not result.is_main_process:
        sys.exit(DONE if result.finished else INTERRUPTED)
    if not result.finished:
        click.echo(_stopped(folder, phase, skip_bad_files), err=True)
    for line in summary(result.run, folder):
        click.echo(line)
    click.echo(f"checkpoint: {result.checkpoint}")
    following = ["nsp", "export", "--checkpoint", str(result.checkpoint)]
    if phase is not None and phase != result.run.phases[-1].name:
        following = ["python", "train.py", "--resume", "--output-dir", str(folder)]
    click.echo(f"next: {shlex.join(following)}")
    sys.exit(DONE if result.finished else INTERRUPTED)


def _folder(preset: str | None, changes: Mapping[str, Any], output_dir: Path | None) -> Path:
    """Return the run folder of a command line."""
    from nsp.family.recipes import default_recipe, recipe

    if output_dir is not None:
        return output_dir
    if changes["config"] is not None:
        return Path("runs", changes["config"].stem)
    found = recipe(preset or default_recipe(changes))
    return found.output_dir or Path("runs", found.name)


def _say_default(changes: Mapping[str, Any]) -> None:
    """Say which preset a command line without one has chosen for own pictures."""
    from nsp.family.recipes import DEFAULT, DEFAULT_FOR_DATA, default_recipe

    if default_recipe(changes) == DEFAULT_FOR_DATA:
        logger.info(
            "no --preset is given: %s continues the bundled model on %s; --preset %s trains all "
            "parts from new weights",
            *(DEFAULT_FOR_DATA, changes["data"], DEFAULT),
        )


def _stopped(folder: Path, phase: str | None, skip_bad_files: bool) -> str:
    """Return the message with the command that continues a stopped run."""
    again = ["python", "train.py", "--resume", "--output-dir", str(folder)]
    again += ["--phase", phase] if phase else []
    again += ["--skip-bad-files"] if skip_bad_files else []
    return f"stopped; continue with: {shlex.join(again)}"


def run_of(path: Path, output_dir: Path | None) -> Path:
    """Return the run folder at or around `path`; raise ConfigError when there is none."""
    if not path.exists():
        raise ConfigError(f"--resume-from {path}: the folder does not exist")
    found = next((each for each in (path, *path.parents) if (each / "run.json").is_file()), None)
    found = found or output_dir  # saved steps may be outside the run folder
    if found is None or (output_dir is not None and found.resolve() != output_dir.resolve()):
        raise ConfigError(
            f"--resume-from {path}: no run.json in it or above it, or one of another run than "
            "--output-dir; give the run's folder"
        )
    return found


def summary(run: "RunConfig", folder: Path) -> list[str]:
    """Return lines about the progress of each phase and the places of a run's files."""
    lines = []
    for phase in run.phases:
        log = folder / phase.name / "log.jsonl"
        reports = log.read_text().splitlines() if log.is_file() else []
        rows = [row for row in map(json.loads, reports) if "loss" in row]
        if rows:
            last = rows[-1]
            lines.append(
                f"{phase.name}: {last['step']} of {phase.steps} steps, loss {last['loss']:.4g}"
            )
            if (verdict := folder / phase.name / "verdict.json").is_file():
                lines.append(f"  {json.loads(verdict.read_text())['says']}")
            if any((folder / phase.name / "samples").glob("*.png")):
                lines.append(f"  samples: {folder / phase.name / 'samples'}")
    logs = run.tracking.tensorboard_dir(folder)
    if logs.is_dir():
        lines.append(f"watch: {shlex.join(['tensorboard', '--logdir', str(logs)])}")
    return lines
