"""`nsp generate`: prompts or classes become pictures in a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from nsp.console.command_line import OTHER_OPTIONS, group
from nsp.console.common_options import (
    COUNT,
    FILE,
    FOLDER,
    SEED,
    backend_option,
    checkpoint_option,
    engine_dir_option,
    json_option,
    lora_option,
    no_verify_option,
    one_precision,
    output_dir_option,
    precision_options,
    threads_option,
    torch_threads,
    verbose_option,
)
from nsp.console.settings import (
    SamplingVerb,
    check_conditions,
    check_settings,
    class_numbers,
    planned_orders,
    prompts_not_given,
    setting_names,
    with_arrays,
    with_class_numbers,
)
from nsp.console.terminal import print_json
from nsp.errors import ConfigError, NspError

if TYPE_CHECKING:
    from nsp.console.prompt_lists import ListedImage
    from nsp.console.sample_command import PlannedSet
    from nsp.family.contract import AnyFamily
    from nsp.pipeline.pipeline import Pipeline


@click.command(cls=SamplingVerb)
@group("Model")
@engine_dir_option
@checkpoint_option("Run this checkpoint folder with PyTorch instead of engines.")
@lora_option
@no_verify_option
@group("Images")
@click.option(
    "--prompt", "--text-prompt", "prompts", multiple=True, help="What to show. Repeatable."
)
@click.option(
    "--prompts-file",
    type=FILE,
    help="Text file with one prompt per line, or .csv or .jsonl with prompt or class (number or "
    "name), seed, negative_prompt and settings such as guidance_scale.",
)
@click.option("--unconditional", is_flag=True, help="Without a prompt, where the model can do so.")
@click.option("--negative-prompt", help="What not to show; used instead of the null condition.")
@click.option(
    "--class", "class_names", multiple=True, help="Class by its name, if it has one. Repeatable."
)
@click.option("--class-id", "class_ids", type=int, multiple=True, help="Class. Repeatable.")
@click.option(
    "--num-images",
    type=COUNT,
    help="Images for each prompt.  [default: 1; for next-scale, the value of --batch-size]",
)
@click.option(
    "--seed",
    "seeds",
    type=SEED,
    multiple=True,
    help="The same seed and backend give the same image; image k of a prompt has seed SEED + k. "
    "Repeatable: one for each image.  [default: 0; 42 for next-scale]",
)
@group("Speed")
@click.option("--batch-size", type=COUNT, help="Images made at once; it does not change them.")
@click.option("--device", help="cpu or cuda.  [default: a GPU if there is one]")
@backend_option
@precision_options("Run {} engines instead of those that suit the device best.")
@threads_option("CPU threads.")
@group("Files")
@click.option(
    "--save-intermediates",
    is_flag=True,
    help="Also save intermediate pictures, for example after every scale.",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(("png", "webp", "jpeg", "npz")),
    default="png",
    show_default=True,
    help="Files to write; webp is lossless, npz is one array of all images.",
)
@click.option("--sheet/--no-sheet", default=True, help="Write a contact sheet.  [default: yes]")
@output_dir_option("outputs", "Folder for the images; those already there are not made again.")
@click.option(
    "--image-size-eval",
    type=click.IntRange(1, 8192),
    help="Resize pictures to this side, bicubic, before they become 8-bit numbers.",
)
@group("Sets for evaluation")
@click.option(
    "--npz",
    type=FOLDER,
    help="Make one .npz of --num-images pictures (default 50000) of a class model in this folder, "
    "for nsp evaluate; a stopped run continues.",
)
@click.option(
    "--labels",
    metavar="random|FILE",
    help="Classes of the pictures: random, or a file (one class per line, or .npy).  "
    "[default: random]",
)
@click.option(
    "--shard",
    metavar="I/N",
    help="Make only this share, I from 0 to N - 1.  [default: RANK and WORLD_SIZE, which torchrun "
    "sets; otherwise 0/1]",
)
@group(OTHER_OPTIONS)
@json_option
@verbose_option
def generate(
    *,
    engine_dir: Path | None,
    checkpoint: Path | None,
    lora: Path | None,
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    class_names: tuple[str, ...],
    class_ids: tuple[int, ...],
    unconditional: bool,
    negative_prompt: str | None,
    num_images: int | None,
    seeds: tuple[int, ...],
    batch_size: int | None,
    device: str | None,
    backend: str,
    threads: int | None,
    save_intermediates: bool,
    file_format: Literal["png", "webp", "jpeg", "npz"],
    sheet: bool,
    output_dir: Path,
    image_size_eval: int | None,
    npz: Path | None,
    labels: str | None,
    shard: str | None,
    no_verify: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make images with exported engines, or with a checkpoint."""
    from nsp.paths import check_output

    check_output(output_dir)
    precision = one_precision(options)
    for name, value in (("--labels", labels), ("--shard", shard)):
        if value is not None and npz is None:
            raise ConfigError(f"{name} belongs to sets of pictures; give --npz FOLDER too")
    family, config = _family_of(checkpoint or engine_dir or Path("engines"))
    given = {name: value for name, value in options.items() if value is not None}
    if family is not None:
        check_settings(family, given)
        class_ids = (*class_ids, *class_numbers(family, config, class_names))
    listed: tuple[ListedImage, ...] = ()
    planned: PlannedSet | None = None
    if prompts_file is not None:
        from nsp.console.prompt_lists import read_list

        names = () if family is None else setting_names(family)
        kind = family and family.condition(family.config.from_dict(config))
        listed = read_list(prompts_file, names, has_condition=kind != "none")
        listed = listed if family is None else with_class_numbers(family, config, listed)
    if unconditional and (prompts or class_ids or listed):
        raise ConfigError("--unconditional is for pictures without a prompt or class; omit either")
    check_conditions(family, prompts, class_ids, listed)
    if npz is not None:
        from nsp.console.sample_command import device_of_process, planned_set

        one_by_one = {
            "--prompt": prompts,
            "--class or --class-id": class_ids,
            "--prompts-file": prompts_file,
            "--unconditional": unconditional,
            "--negative-prompt": negative_prompt,
            "--save-intermediates": save_intermediates,
            "--seed more than once": len(seeds) > 1,
        }
        planned = planned_set(npz, labels, shard, one_by_one)
        device = device_of_process(device, checkpoint)
    pipeline = _load(
        engine_dir,
        checkpoint,
        backend,
        precision,
        device,
        threads,
        verify=not no_verify,
        lora=lora,
    )
    family = pipeline.family
    seed = seeds[0] if seeds else family.default_seed
    declared = family.given(pipeline.config)
    files = {name: given.pop(name) for name in declared if name in given}
    if planned is not None:
        with torch_threads(threads if checkpoint else None):
            planned.make(
                pipeline,
                sampling=pipeline.sampling.changed(given),
                given=files,
                num_images=num_images,
                seed=seed,
                size_px=image_size_eval,
                batch_size=batch_size or family.default_batch_size,
                as_json=as_json,
            )
        return
    if not prompts and not class_ids and not listed:
        prompts = prompts_not_given(family, pipeline.config, unconditional=unconditional)
    if num_images is None:  # of some first implementations the batch size is the number of images
        num_images = (batch_size or 1) if family.batch_is_images else 1
    orders = planned_orders(
        pipeline.sampling.changed(given),
        listed,
        prompts=prompts,
        class_ids=class_ids,
        seed=seeds if len(seeds) > 1 else seed,
        num_images=num_images,
        negative=negative_prompt,
    )
    orders = with_arrays(orders, declared, files) if files else orders
    from nsp.console.gallery import generate_gallery  # while the engines are loading
    from nsp.console.terminal import progress_bar
    from nsp.pipeline.orders import choose_batch_size

    with progress_bar() as show, torch_threads(threads if checkpoint else None):
        gallery = generate_gallery(
            pipeline,
            orders,
            output_dir,
            batch_size=choose_batch_size(pipeline, batch_size or family.default_batch_size),
            save_intermediates=save_intermediates,
            kind=file_format,
            sheet=sheet,
            size_px=image_size_eval,
            on_step=lambda step: show(step.activity, step.scale, step.num_scales),
        )
    if as_json:
        print_json({"backend": pipeline.backend.name, **gallery.to_dict()})
        return
    for image in gallery.images:
        note = "" if image.warm else " (first batch, includes loading)"
        time = "was there already" if image.ms is None else f"{image.ms:.1f} ms{note}"
        click.echo(f"{image.path}  {time}")
    if gallery.contact_sheet is not None:
        click.echo(f"contact sheet: {gallery.contact_sheet}")


def _family_of(folder: Path) -> "tuple[AnyFamily | None, Mapping[str, Any]]":
    """Return the family whose defaults apply, and the model's stored configuration.

    None if they are unknown: loading the folder will report what is wrong.
    """
    from nsp.family.registry import family
    from nsp.files import read_json
    from nsp.paths import describe

    try:
        if describe(folder).kind == "engines":  # loading them checks all that their manifest says
            found = read_json(folder / "manifest.json")
            return family(str(found["family"])), found["config"]
        from nsp.artifacts.checkpoint import read_checkpoint

        record = read_checkpoint(folder, verify=False)
        return record.family, record.config
    except (NspError, OSError, ValueError, KeyError):
        return None, {}


def _load(
    engine_dir: Path | None,
    checkpoint: Path | None,
    backend: str,
    precision: str | None,
    device: str | None,
    threads: int | None,
    *,
    verify: bool,
    lora: Path | None,
) -> "Pipeline":
    """Return the model of the given folder; each option accepts only its own kind of folder."""
    from nsp.paths import NOTHING, describe, wrong_path
    from nsp.pipeline.pipeline import load_pipeline

    if engine_dir is not None and checkpoint is not None:
        raise ConfigError("--engine-dir and --checkpoint are both given; choose one")
    if checkpoint is not None:
        if precision is not None:
            raise ConfigError(f"--{precision} is for engines; a checkpoint runs in fp32")
        if (found := describe(checkpoint)).kind == "engines":
            raise ConfigError(wrong_path(checkpoint, "--checkpoint", found))
        from nsp.artifacts.checkpoint import read_checkpoint

        folder = read_checkpoint(checkpoint, verify=verify).folder
        return load_pipeline(folder, backend, device=device, verify=verify, lora=lora)
    folder = engine_dir or Path("engines")
    if (found := describe(folder)).kind not in (*NOTHING, "engines"):
        raise ConfigError(wrong_path(folder, "--engine-dir", found))
    return load_pipeline(
        folder,
        backend,
        precision=precision,
        device=device,
        num_threads=threads,
        verify=verify,
        lora=lora,
    )
