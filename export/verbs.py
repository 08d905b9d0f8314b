"""`nsp export` makes engines; `nsp verify` compares existing ones with PyTorch."""

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nsp.console.command_line import OTHER_OPTIONS, Verb, group
from nsp.console.common_options import (
    COUNT,
    FOLDER,
    backend_option,
    checkpoint_option,
    engine_dir_option,
    given_precisions,
    json_option,
    lora_option,
    no_verify_option,
    one_precision,
    precision_options,
    threads_option,
    torch_threads,
    verbose_option,
)
from nsp.console.terminal import print_json, print_tables
from nsp.errors import ConfigError

if TYPE_CHECKING:
    from nsp.export.plan import PlannedBuild


@click.command("export", cls=Verb)
@group("Model and engines")
@checkpoint_option("Model to export.  [default: newest training run, or the bundled demo]")
@lora_option
@engine_dir_option
@click.option("--rebuild", is_flag=True, help="Build all stages again, also unchanged ones.")
@click.option("--dry-run", is_flag=True, help="Show what would be built, and write nothing.")
@no_verify_option
@group("What is built")
@precision_options("Export in {}.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("auto",),
    show_default=True,
    help="auto (what this machine can run), onnxruntime, tensorrt, tensorrt-rtx. Repeatable.",
)
@group("TensorRT")
@click.option(
    "--max-batch",
    type=COUNT,
    default=4,
    show_default=True,
    help="Images per batch of TensorRT engines; ONNX Runtime has no limit.",
)
@click.option(
    "--static-batch",
    is_flag=True,
    help="Build faster TensorRT engines, for guided images and one batch size only; smaller "
    "batches are padded.",
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
@group(OTHER_OPTIONS)
@threads_option("CPU threads for the comparison with PyTorch.")
@json_option
@verbose_option
def export_engines(
    *,
    checkpoint: Path | None,
    lora: Path | None,
    engine_dir: Path | None,
    threads: int | None,
    dry_run: bool,
    no_verify: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Export a checkpoint to engines, and compare them with PyTorch.

    Existing unchanged stages are reused; an interrupted export continues where it stopped.
    The default precision is fp32. With --lora, the merged model is kept as a checkpoint beside the
    engines.
    """
    from nsp.console.inspection import describe_folder, parity_lines
    from nsp.console.terminal import progress_bar
    from nsp.export.run import ExportEvent, ExportOptions, export, find_checkpoint, plan

    folder, source = engine_dir or Path("engines"), checkpoint or find_checkpoint()
    if lora is not None and dry_run:
        raise ConfigError("--dry-run writes nothing, but --lora is merged into a new checkpoint")
    if lora is not None:
        from nsp.artifacts.merged import write_merged

        source = write_merged(source, lora, folder.with_name(f"{folder.name}-merged"))
        click.echo(f"merged checkpoint: {source}", err=True)
    export_options = ExportOptions(
        checkpoint=str(source),
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
    kind = manifest.family_record.condition(manifest.model_config)
    asked = {"prompt": ' --prompt "…"', "class": " --class-id 0", "none": ""}[kind]
    for line in parity_lines(manifest):
        click.echo(line)
    click.echo(f"engines: {folder} ({', '.join(manifest.backends())})")
    click.echo(f"next: nsp generate --engine-dir {shlex.quote(str(folder))}{asked}")


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
    print_tables([table])
    click.echo(f"nothing was written to {folder}")


@click.command("verify", cls=Verb)
@click.argument("engine_dir", type=FOLDER)
@checkpoint_option("PyTorch model to compare with.  [default: the source of the export]")
@backend_option
@precision_options("Check the {} engines instead of those that suit the device best.")
@click.option(
    "--recorded", is_flag=True, help="Use the outputs recorded at export, even with PyTorch."
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
    """Compare every stage of ENGINE_DIR with PyTorch, on this machine's backend.

    Without torch or the checkpoint, the outputs recorded at export are used. A failure names the
    first wrong tensor; the exit code is then 1.
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
