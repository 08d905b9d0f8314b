"""`nsp generate`: prompts or classes become pictures in a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nsp.console.command_line import (
    COUNT,
    FILE,
    SEED,
    Verb,
    backend_option,
    checkpoint_option,
    engine_dir_option,
    json_option,
    no_verify_option,
    one_precision,
    output_dir_option,
    precision_options,
    print_json,
    threads_option,
    torch_threads,
    verbose_option,
)
from nsp.errors import ConfigError, NspError

if TYPE_CHECKING:
    from nsp.console.prompt_lists import ListedImage
    from nsp.family.contract import AnyFamily
    from nsp.pipeline.pipeline import Pipeline


@click.command(cls=Verb)
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
