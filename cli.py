"""`nsp …`: every verb is a thin function: parse, configuration, library call, report."""

import shlex
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nsp.benchmarks.verbs import bench
from nsp.console.command_line import (
    COUNT,
    FILE,
    FOLDER,
    SEED,
    Program,
    backend_option,
    checkpoint_option,
    engine_dir_option,
    given_precisions,
    json_option,
    no_verify_option,
    one_precision,
    output_dir_option,
    precision_options,
    print_json,
    read_json,
    threads_option,
    torch_threads,
    verbose_option,
    version_option,
)
from nsp.console.data_verbs import data
from nsp.errors import ConfigError, NspError

if TYPE_CHECKING:
    from nsp.console.prompt_lists import ListedImage
    from nsp.export.plan import PlannedBuild
    from nsp.family.contract import AnyFamily
    from nsp.pipeline.pipeline import Pipeline


def _print_tables(tables: Iterable[Any]) -> None:
    from nsp.console.terminal import results_console

    console = results_console()
    for table in tables:
        console.print(table)


@click.group(
    "nsp",
    cls=Program,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Options may be spelled with underscores, too.
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@version_option
@verbose_option
@click.pass_context
def main(context: click.Context) -> None:
    """Export, run and measure next-scale image generators. Train one with: python train.py."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command("export")
@checkpoint_option("Model to export.  [default: newest training run, else the bundled demo]")
@engine_dir_option
@precision_options("Export in {}.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("auto",),
    show_default=True,
    help="auto (all that is installed), onnxruntime, tensorrt, tensorrt-rtx. Repeatable.",
)
@click.option(
    "--max-batch",
    type=COUNT,
    default=4,
    show_default=True,
    help="Images per batch of TensorRT engines; ONNX Runtime takes any.",
)
@click.option(
    "--static-batch", is_flag=True, help="TensorRT engines for full batches only: faster."
)
@click.option(
    "--gpu-arch",
    "gpu_archs",
    multiple=True,
    help="Build TensorRT-RTX engines for this GPU architecture (89) or for `current`. Repeatable.",
)
@click.option(
    "--build-timeout",
    "build_timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="Stop the compiler of a TensorRT engine after this long.",
)
@threads_option("CPU threads of the checks against PyTorch.")
@click.option("--rebuild", is_flag=True, help="Build again what could be reused.")
@click.option("--dry-run", is_flag=True, help="Say what would be built; write nothing.")
@no_verify_option
@json_option
@verbose_option
def export_engines(
    *,
    checkpoint: Path | None,
    engine_dir: Path | None,
    threads: int | None,
    dry_run: bool,
    no_verify: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Export a checkpoint to engines, with parity checked.

    Stages that are built and unchanged are reused; an interrupted export goes on where it stopped.
    Without a precision, fp32.
    """
    from nsp.console.inspection import describe_folder
    from nsp.console.terminal import progress_bar
    from nsp.export.run import ExportEvent, ExportOptions, export, find_checkpoint, plan

    folder = engine_dir or Path("engines")
    export_options = ExportOptions(
        checkpoint=str(checkpoint or find_checkpoint()),
        engine_dir=str(folder),
        precisions=given_precisions(options) or ("fp32",),
        verify=not no_verify,
        num_threads=threads,
        **options,
    )
    if dry_run:
        _report_plan(folder, plan(export_options), as_json=as_json)
        return
    with progress_bar() as show, torch_threads(threads):

        def on_event(event: ExportEvent) -> None:
            if event.stage:  # the end is logged
                activity = f"{event.stage} {event.target} {event.precision}: {event.message}"
                show(activity, round(100 * event.fraction), 100)

        manifest = export(export_options, on_event=on_event)
    if as_json:
        print_json(describe_folder(folder))
        return
    condition = '--prompt "…"' if "text_encoder" in manifest.stages else "--class-id 0"
    click.echo(f"engines: {folder} ({', '.join(manifest.backends())})")
    click.echo(f"next: nsp generate --engine-dir {shlex.quote(str(folder))} {condition}")


def _report_plan(folder: Path, builds: "Sequence[PlannedBuild]", *, as_json: bool) -> None:
    """Print what an export would do."""
    from rich.table import Table

    fields = ("stage", "target", "precision", "action", "reason", "estimated_bytes", "gpu_archs")
    rows = [{name: getattr(build, name) for name in fields} for build in builds]
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "target", "precision", "action", "about", "because"):
        table.add_column(name, overflow="fold")
    for row in rows:
        size = f"{row['estimated_bytes'] / 2**20:.1f} MiB" if row["action"] == "build" else ""
        table.add_row(*(row[n] for n in fields[:4]), size, row["reason"])
    _print_tables([table])
    click.echo(f"nothing was written to {folder}")


@main.command()
@engine_dir_option
@checkpoint_option("Run this checkpoint folder with PyTorch instead of engines.")
@click.option(
    "--prompt", "--text-prompt", "prompts", multiple=True, help="What to show. Repeatable."
)
@click.option(
    "--prompts-file",
    type=FILE,
    help="Text file with one prompt per line; .csv or .jsonl with prompt or class, and seed.",
)
@click.option("--class-id", "class_ids", type=int, multiple=True, help="Class. Repeatable.")
@click.option(
    "--num-images", type=COUNT, default=1, show_default=True, help="Images for each prompt."
)
@click.option(
    "--seed",
    type=SEED,
    help="Same seed and backend, same image. The k-th image of a prompt has seed SEED + k.  "
    "[default: 0; 42 of next-scale]",
)
@click.option("--batch-size", type=COUNT, help="Images made at once; changes none of them.")
@click.option("--initial-size", type=COUNT, help="Side of the first latent the model must have.")
@click.option(
    "--target-size", type=COUNT, help="Side of the image in pixels, one of the model's scales."
)
@click.option("--scale-factor", type=COUNT, help="From scale to scale, which the model must have.")
@click.option("--device", help="cpu or cuda.  [default: a GPU if there is one]")
@click.option("--guidance-scale", type=float, help="Strength of guidance; 1 is off.")
@click.option(
    "--guidance-schedule",
    type=click.Choice(["ramp", "constant", "interval"]),
    help="How guidance changes over the scales.",
)
@click.option(
    "--guidance-interval",
    type=float,
    nargs=2,
    metavar="FROM TO",
    help="Where `interval` guides: fractions of the schedule.",
)
@click.option(
    "--guidance-until",
    type=click.IntRange(0),
    metavar="SCALES",
    help="Guide the first SCALES scales only: the last, largest ones then cost half.",
)
@click.option("--top-k", type=int, help="Draw from the K likeliest codes; 0 is off, 1 greedy.")
@click.option("--top-p", type=float, help="Draw from the likeliest codes of mass P; 1 is off.")
@click.option("--temperature", type=float, help="Divides the logits; below 1 is safer.")
@click.option("--more-smooth/--no-more-smooth", default=None, help="Mix codes (Gumbel softmax).")
@backend_option
@precision_options("Run {} engines instead of what suits the device.")
@threads_option("CPU threads.")
@click.option("--save-intermediates", is_flag=True, help="Save the picture after every scale.")
@output_dir_option("outputs", "Where the images go.")
@no_verify_option
@json_option
@verbose_option
def generate(
    *,
    engine_dir: Path | None,
    checkpoint: Path | None,
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    class_ids: tuple[int, ...],
    num_images: int,
    seed: int | None,
    batch_size: int | None,
    initial_size: int | None,
    target_size: int | None,
    scale_factor: int | None,
    device: str | None,
    backend: str,
    threads: int | None,
    save_intermediates: bool,
    output_dir: Path,
    no_verify: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make images with exported engines, or with a checkpoint."""
    from nsp.paths import check_output
    from nsp.pipeline.batches import choose_batch_size, plan_images

    check_output(output_dir)
    listed: tuple[ListedImage, ...] = ()
    if prompts_file is not None:
        from nsp.console.prompt_lists import read_list

        listed = read_list(prompts_file)
    seeds = (*(None for _ in prompts or class_ids), *(row.seed for row in listed))
    prompts += tuple(row.prompt for row in listed if row.prompt is not None)
    class_ids += tuple(row.class_id for row in listed if row.class_id is not None)
    family = _family_of(checkpoint or engine_dir or Path("engines"))
    if family is not None and family.default_prompt and not prompts and not class_ids:
        prompts = (family.default_prompt,)
    if seed is None:
        seed = family.default_seed if family else 0
    planned = plan_images(
        prompts=prompts,
        class_ids=class_ids,
        seed=seed,
        num_images=num_images,
        seeds=seeds,
        allow_empty=family is not None and family.takes_no_prompt,
    )
    precision = one_precision(options)
    sampling = {name: value for name, value in options.items() if value is not None}
    pipeline = _load(
        engine_dir, checkpoint, backend, precision, device, threads, verify=not no_verify
    )
    sizes = {"initial_size": initial_size, "target_size": target_size, "scale_factor": scale_factor}
    last_scale = _scale_of(pipeline, {n: size for n, size in sizes.items() if size is not None})
    from nsp.console.gallery import generate_gallery  # while the engines are loading
    from nsp.console.terminal import progress_bar

    with progress_bar() as show, torch_threads(threads if checkpoint else None):
        gallery = generate_gallery(
            pipeline,
            planned,
            output_dir,
            batch_size=choose_batch_size(
                pipeline, batch_size or pipeline.family.default_batch_size
            ),
            save_intermediates=save_intermediates,
            last_scale=last_scale,
            on_step=lambda step: show(step.activity, step.scale, step.num_scales),
            **sampling,
        )
    if as_json:
        print_json({"backend": pipeline.backend.name, **gallery.to_dict()})
        return
    for image in gallery.images:
        note = "" if image.warm else " (first batch: with loading)"
        click.echo(f"{image.path}  {image.ms:.1f} ms{note}")
    click.echo(f"contact sheet: {gallery.contact_sheet}")


def _family_of(folder: Path) -> "AnyFamily | None":
    """Return the family whose defaults hold, or None: loading the folder will say what is wrong."""
    from nsp.artifacts.checkpoint import is_checkpoint, read_checkpoint
    from nsp.artifacts.manifest import read_manifest
    from nsp.family.registry import family

    try:
        if is_checkpoint(folder):
            return read_checkpoint(folder, verify=False).family
        return family(read_manifest(folder).family)
    except NspError:
        return None


def _scale_of(pipeline: "Pipeline", sizes: dict[str, int]) -> int | None:
    """Return the scale to stop at for the sizes asked for; None is the last."""
    if not sizes:
        return None
    return pipeline.family.scale_of(pipeline.config, sizes)


def _load(
    engine_dir: Path | None,
    checkpoint: Path | None,
    backend: str,
    precision: str | None,
    device: str | None,
    threads: int | None,
    *,
    verify: bool,
) -> "Pipeline":
    """Return the model of the folder given; each option takes its own kind of folder only."""
    from nsp.artifacts.checkpoint import read_checkpoint
    from nsp.paths import NOTHING, describe, wrong_path
    from nsp.pipeline.pipeline import load_pipeline

    if engine_dir is not None and checkpoint is not None:
        raise ConfigError("--engine-dir and --checkpoint are both given; choose one")
    if checkpoint is not None:
        if precision is not None:
            raise ConfigError(f"--{precision} is for engines; a checkpoint runs in fp32")
        if (found := describe(checkpoint)).kind == "engines":
            raise ConfigError(wrong_path(checkpoint, "--checkpoint", found))
        folder = read_checkpoint(checkpoint, verify=verify).folder
        return load_pipeline(folder, backend, device=device, verify=verify)
    folder = engine_dir or Path("engines")
    if (found := describe(folder)).kind not in (*NOTHING, "engines"):
        raise ConfigError(wrong_path(folder, "--engine-dir", found))
    return load_pipeline(
        folder, backend, precision=precision, device=device, num_threads=threads, verify=verify
    )


@main.command()
@click.option("--family", "family_name", required=True, help="Model family of the weights: var.")
@click.option("--tokenizer", type=FILE, required=True, help="Weights of the image tokenizer.")
@click.option("--predictor", type=FILE, required=True, help="Weights of the transformer.")
@click.option(
    "--config", type=FILE, help="JSON with constructor arguments that shapes do not tell."
)
@click.option("--output-dir", type=FOLDER, required=True, help="Checkpoint folder to write.")
@verbose_option
def convert(
    *,
    family_name: str,
    tokenizer: Path,
    predictor: Path,
    config: Path | None,
    output_dir: Path,
) -> None:
    """Turn published weights into a checkpoint folder."""
    from nsp.family.registry import family
    from nsp.paths import check_output

    check_output(output_dir)
    record = family(family_name)
    values = None if config is None else read_json(config)
    record.convert({"tokenizer": tokenizer, "predictor": predictor}, values, output_dir)
    click.echo(f"checkpoint: {output_dir}")
    click.echo(f"next: nsp export --checkpoint {shlex.quote(str(output_dir))}")


@main.command("verify")
@click.argument("engine_dir", type=FOLDER)
@checkpoint_option("PyTorch model to hold them to.  [default: what they were exported from]")
@backend_option
@precision_options("Check the {} engines instead of what suits the device.")
@click.option(
    "--recorded", is_flag=True, help="Use the outputs recorded at export, even beside PyTorch."
)
@no_verify_option
@threads_option("CPU threads.")
@json_option
@verbose_option
def verify_engines(
    *,
    engine_dir: Path,
    checkpoint: Path | None,
    backend: str,
    recorded: bool,
    no_verify: bool,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Hold every stage of ENGINE_DIR to PyTorch, on this machine's backend.

    Without torch or the checkpoint, to the outputs recorded at export. A failure names the first
    wrong tensor; exit 1.
    """
    from nsp.export.proof.verify import verify

    with torch_threads(None if recorded or find_spec("torch") is None else threads):
        found = verify(
            engine_dir,
            backend=backend,
            precision=one_precision(options),
            checkpoint=checkpoint,
            recorded=recorded,
            verify_digests=not no_verify,
            num_threads=threads,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        for check in found.stages:
            error = (
                "" if check.largest_error is None else f"largest error {check.largest_error:.1e}"
            )
            state = "ok" if check.passed else "FAILED"
            click.echo(f"{check.stage:<14} {state:<7} {check.calls:>3} calls  {error}")
        click.echo(f"{found.backend} {found.precision} against {found.reference}")
    if (failure := found.failure()) is not None:
        raise failure


@main.command()
@click.argument("folder", type=FOLDER)
@json_option
@verbose_option
def inspect(*, folder: Path, as_json: bool) -> None:
    """Show what an engine or checkpoint folder says about itself."""
    from nsp.console.inspection import describe_folder, render_folder

    found = describe_folder(folder)
    if as_json:
        print_json(found)
    else:
        _print_tables(render_folder(found))


@main.command()
@json_option
@verbose_option
def doctor(*, as_json: bool) -> None:
    """Say what works on this machine and what to install.

    Lists every backend with the reason why it does or does not work, and what optional packages
    are missing. Changes nothing.
    """
    from nsp.console.doctor import examine, render_findings

    found = examine()
    if as_json:
        print_json(found)
    else:
        _print_tables(render_findings(found))


main.add_command(data)
main.add_command(bench)

if __name__ == "__main__":
    main()
