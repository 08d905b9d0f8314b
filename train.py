"""`python train.py`: train a model; without arguments, the demo model on the embedded emoji set."""

import dataclasses
import json
import logging
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nsp.console.command_line import (
    COUNT,
    DONE,
    FOLDER,
    INTERRUPTED,
    OneLineErrors,
    drop_unwritten,
    explain,
    open_standard_streams,
    read_json,
)
from nsp.errors import ConfigError, one_line

if TYPE_CHECKING:
    from nsp.family.recipe import RunConfig

# Fields of RunConfig that are options of the same name.
_OPTIONS = (
    "seed",
    "precision",
    "start_from",
    "parallel",
    "compile",
    "activation_checkpointing",
    "tracking",
    "checkpoint_dir",
)
SCALE = click.IntRange(min=0)


@click.command(
    cls=OneLineErrors,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@click.option(
    "--preset",
    help="Named run: emoji, quick, smoke, next-scale, next-scale-sdxl.  [default: emoji]",
)
@click.option("--config", type=FOLDER, help="JSON file of a run, instead of a preset.")
@click.option(
    "--data", "--data-dir", help="'emoji', a .tar, a folder, hf:NAME_OR_FOLDER, or shards."
)
@click.option("--val-dir", help="Pictures to validate on, in place of the held-out ones.")
@click.option("--num-workers", type=SCALE, help="Processes that read pictures ahead.")
@click.option("--stream", is_flag=True, help="Read --data (shards, paths or URLs) as it comes.")
@click.option("--token-cache", help="Tokens of the pictures, made by nsp data cache.")
@click.option("--text-encoder", help="Pretrained CLIP or pipeline folder to start from.")
@click.option(
    "--output-dir",
    type=FOLDER,
    help="Run folder, with samples in it.  [default: runs/PRESET or runs/NAME of FILE]",
)
@click.option("--checkpoint-dir", help="Folder of saved steps.  [default: in the run folder]")
@click.option("--log-dir", help="Folder of TensorBoard's files.  [default: in the run folder]")
@click.option("--vae", "pretrained_vae", help="AutoencoderKL folder to take (next-scale).")
@click.option("--initial-size", type=COUNT, help="Side of the first latent (next-scale).")
@click.option("--target-size", type=COUNT, help="Side of the image in pixels (next-scale).")
@click.option("--scale-factor", type=COUNT, help="From a latent's side to the next (next-scale).")
@click.option("--batch-size", type=COUNT, help="Pictures of a step, over all devices.")
@click.option("--learning-rate", type=float, help="Peak of every phase.")
@click.option("--num-epochs-per-scale", type=COUNT, help="Length of training (next-scale).")
@click.option("--progressive", is_flag=True, help="One scale after the other (next-scale).")
@click.option("--start-scale", type=SCALE, help="First scale to train (next-scale).  [default: 0]")
@click.option("--end-scale", type=SCALE, help="Last scale to train.  [default: the finished one]")
@click.option("--save-every", type=COUNT, help="Epochs between saved steps.")
@click.option("--validate-every", type=COUNT, help="Epochs between validations.")
@click.option("--steps", type=int, help="Steps of every phase, instead of the preset's.")
@click.option("--phase", help="Stop after this phase.")
@click.option("--from-phase", help="Leave out the phases before this one (with --start-from).")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), help="Seed of weights, data order and samples."
)
@click.option("--precision", help="auto, fp32, bf16 or fp16.")
@click.option("--fp16", is_flag=True, help="The same as --precision fp16.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: a GPU, if any]")
@click.option("--start-from", help="Checkpoint folder whose weights to start with.")
@click.option("--parallel", help="How several processes share the work: ddp or fsdp.")
@click.option("--compile/--no-compile", default=None, help="Use torch.compile.")
@click.option(
    "--activation-checkpointing/--no-activation-checkpointing",
    default=None,
    help="Compute activations twice to save memory.",
)
@click.option("--mlflow", help="Record to MLflow: 'local', a folder, or a server's URI.")
@click.option("--resume", is_flag=True, help="Continue the run in the run folder.")
@click.option("--resume-from", type=FOLDER, help="Continue the run this folder is of, or lies in.")
@click.option(
    "--accept-changed-data", is_flag=True, help="Resume although the data changed meanwhile."
)
@click.option("--skip-bad-files", is_flag=True, help="Leave bad pictures out instead of stopping.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def main(
    preset: str | None,
    output_dir: Path | None,
    phase: str | None,
    resume: bool,
    resume_from: Path | None,
    accept_changed_data: bool,
    skip_bad_files: bool,
    verbose: bool,
    device: str | None,
    fp16: bool,
    **changes: Any,
) -> None:
    """Train phase after phase; leaves a checkpoint folder that `nsp export` takes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config: Path | None = changes["config"]
    preset = preset and preset.replace("-", "_")  # both spellings name it
    folder = output_dir or Path("runs") / (config.stem if config else preset or "emoji")
    try:
        open_standard_streams()
        from nsp.training.run import train

        if preset is not None and not resume and resume_from is None:
            folder = _take_defaults(preset, output_dir, changes) or folder
        if resume_from is not None:
            folder, resume = run_of(resume_from, output_dir), True
        if fp16:
            if changes["precision"] not in (None, "fp16"):
                raise ConfigError(f"--fp16 and --precision {changes['precision']}: give one")
            changes["precision"] = "fp16"
        run = configure(
            preset, folder if resume else None, skip_bad_files=skip_bad_files, **changes
        )
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
    for line in summary(run, folder):
        click.echo(line)
    click.echo(f"checkpoint: {result.checkpoint}")
    following = ["nsp", "export", "--checkpoint", str(result.checkpoint)]
    if phase is not None and phase != run.phases[-1].name:
        following = ["python", "train.py", "--resume", "--output-dir", str(folder)]
    click.echo(f"next: {shlex.join(following)}")
    sys.exit(DONE if result.finished else INTERRUPTED)


def _take_defaults(preset: str, output_dir: Path | None, changes: dict[str, Any]) -> Path | None:
    """Fill in what a preset has for options that are not given; return the run folder, if any."""
    from nsp.training.presets import option_defaults

    defaults = dict(option_defaults(preset))
    if not defaults:
        return output_dir
    if changes["data"] is None:
        raise ConfigError(f"--preset {preset} has no pictures of its own: give --data-dir")
    folder: Path = defaults.pop("output_dir")
    in_epochs = ("num_epochs_per_scale", "save_every", "validate_every")
    for name, value in defaults.items():
        if changes[name] is None and not (changes["stream"] and name in in_epochs):
            changes[name] = value
    return output_dir or folder


def _stopped(folder: Path, phase: str | None, skip_bad_files: bool) -> str:
    """Return how a stopped run goes on."""
    again = ["python", "train.py", "--resume", "--output-dir", str(folder)]
    again += ["--phase", phase] if phase else []
    again += ["--skip-bad-files"] if skip_bad_files else []
    return f"stopped; continue with: {shlex.join(again)}"


def run_of(path: Path, output_dir: Path | None) -> Path:
    """Return the run folder that `path` is or lies in; raise ConfigError when there is none."""
    if not path.exists():
        raise ConfigError(f"--resume-from {path}: there is no such folder")
    found = next((each for each in (path, *path.parents) if (each / "run.json").is_file()), None)
    found = found or output_dir  # saved steps that lie elsewhere
    if found is None or (output_dir is not None and found.resolve() != output_dir.resolve()):
        raise ConfigError(
            f"--resume-from {path}: no run.json there or above it, or that of another run than "
            "--output-dir; give the run's folder"
        )
    return found


def summary(run: "RunConfig", folder: Path) -> list[str]:
    """Return what each phase reached and where a run's things lie, a line each."""
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
            if any((folder / phase.name / "samples").glob("*.png")):
                lines.append(f"  samples: {folder / phase.name / 'samples'}")
    logs = run.tracking.tensorboard_dir(folder)
    if logs.is_dir():
        lines.append(f"watch: {shlex.join(['tensorboard', '--logdir', str(logs)])}")
    return lines


def configure(
    preset: str | None,
    resumed: Path | None,
    *,
    config: Path | None = None,
    data: str | None = None,
    text_encoder: str | None = None,
    steps: int | None = None,
    mlflow: str | None = None,
    stream: bool = False,
    token_cache: str | None = None,
    from_phase: str | None = None,
    skip_bad_files: bool = False,
    **changes: Any,
) -> "RunConfig":
    """Return the run a command line describes: a file's, a preset's or a resumed folder's, changed.

    What of a preset an option can change is taken from the resumed run where the option is not
    given, so that the command line that started a run may leave it out. `changes` are fields of
    RunConfig, None where they stay. Raises ConfigError for an unknown preset or a value that is not
    allowed.
    """
    from nsp.family.recipe import RunConfig
    from nsp.training.folder import RUN_NAME, stored_run
    from nsp.training.options import OPTIONS, with_options
    from nsp.training.presets import preset as named_run

    stored: RunConfig | None = None
    if resumed is not None and (resumed / RUN_NAME).is_file():
        stored = stored_run(resumed)
    if preset is not None and config is not None:
        raise ConfigError(f"--preset {preset} and --config {config}: give one of them")
    if config is not None:
        if not config.is_file():
            raise ConfigError(f"{config} does not exist; give the JSON file of a run")
        run = RunConfig.from_dict(read_json(config))
    elif preset is None and stored is not None:
        run = stored
    else:
        run = named_run(preset or "emoji")
        if stored is not None:
            run = _with_options_of(run, stored)
    values = run.to_dict()
    if data is not None:
        values["data"]["source"] = data
    if text_encoder is not None:
        values["text_encoder"]["folder"] = text_encoder
    if stream:
        values["data"]["stream"] = True
    if token_cache is not None:
        values["data"]["token_cache"] = token_cache
    if mlflow is not None:
        values["tracking"]["mlflow"] = mlflow
    given = {name: value for name, value in changes.items() if value is not None}
    given = {name: value for name, value in given.items() if value or name != "progressive"}
    values |= {name: value for name, value in given.items() if name not in OPTIONS}
    run = with_options(
        RunConfig.from_dict(values),
        {name: given[name] for name in given if name in OPTIONS},
        skip_bad_files=skip_bad_files,
    )
    if from_phase is not None:
        run = _from_phase(run, from_phase)
    if steps is not None:
        phases = tuple(dataclasses.replace(each, steps=steps) for each in run.phases)
        run = dataclasses.replace(run, phases=phases)
    return run


def _from_phase(run: "RunConfig", name: str) -> "RunConfig":
    """Return the run without the phases before `name`; their results must come from elsewhere."""
    names = [phase.name for phase in run.phases]
    if name not in names:
        raise ConfigError(f"unknown phase {name!r} of this run; known: {', '.join(names)}")
    if name != names[0] and run.start_from is None:
        raise ConfigError(
            f"--from-phase {name} leaves out {names[0]}: give the checkpoint that has it with "
            "--start-from"
        )
    return dataclasses.replace(run, phases=run.phases[names.index(name) :])


def _with_options_of(run: "RunConfig", stored: "RunConfig") -> "RunConfig":
    """Return `run` with what command-line options can change as in `stored`."""
    steps = {phase.name: phase.steps for phase in stored.phases}
    folder = {k: v for k, v in stored.text_encoder.items() if k == "folder"}
    return dataclasses.replace(
        run,
        data=stored.data,
        text_encoder={**run.text_encoder, **folder},
        **{name: getattr(stored, name) for name in _OPTIONS},
        phases=tuple(
            dataclasses.replace(phase, steps=steps.get(phase.name, phase.steps))
            for phase in run.phases
        ),
    )


if __name__ == "__main__":
    main()
