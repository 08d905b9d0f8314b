"""`nsp data …`: every verb is a thin function: parse, library call, report."""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nsp.console.command_line import Program
from nsp.console.common_options import (
    COUNT,
    FILE,
    FOLDER,
    json_option,
    output_dir_option,
    seed_option,
    verbose_option,
)
from nsp.console.terminal import print_json
from nsp.errors import ConfigError

if TYPE_CHECKING:
    from nsp.data.stats import Stats

_SHOWN = 8  # entries of a list in the table; stats.json has more

source_argument = click.argument("source")
skip_option = click.option(
    "--skip-bad-files", is_flag=True, help="Leave out unusable files, with a warning for each."
)


@click.group("data", cls=Program)
def data() -> None:
    """Build, pack and examine sets of captioned pictures.

    SOURCE is `emoji` (the embedded set), a folder, a .tar, or hf:NAME_OR_FOLDER[:SPLIT].
    """


@data.command()
@click.option("--font", type=FILE, required=True, help="NotoColorEmoji.ttf.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Tar file to write.",
)
@verbose_option
def build(*, font: Path, output: Path) -> None:
    """Draw the embedded emoji set from its font."""
    from nsp.data.emoji import build as build_emoji

    count = build_emoji(font, output)
    click.echo(f"{output}: {count} pictures")


@data.command()
@source_argument
@click.argument("output_dir", type=FOLDER)
@click.option("--samples-per-shard", type=COUNT, help="Size of a shard in samples, or ...")
@click.option(
    "--shard-size-mb",
    type=click.FloatRange(min=0, min_open=True),
    help="... size of a shard in 10^6 bytes.  [default: 100]",
)
@seed_option("Seed of the shuffled order.")
@skip_option
@json_option
@verbose_option
def pack(
    *,
    source: str,
    output_dir: Path,
    samples_per_shard: int | None,
    shard_size_mb: float | None,
    seed: int,
    skip_bad_files: bool,
    as_json: bool,
) -> None:
    """Write SOURCE as webdataset shards with an index into a new folder OUTPUT_DIR.

    The order is shuffled; the same source and options give the same bytes. Held-out samples are
    packed with their list and stay excluded from training.
    """
    from nsp.data.pack import pack as pack_shards

    index = pack_shards(
        source,
        output_dir,
        samples_per_shard=samples_per_shard,
        shard_size_mb=shard_size_mb,
        seed=seed,
        skip_bad_files=skip_bad_files,
    )
    if as_json:
        print_json(index.to_dict())
        return
    held = f", {index.num_heldout} of them held out" if index.num_heldout else ""
    click.echo(f"{output_dir}: {index.num_samples} samples{held}, {len(index.shards)} shards")


@data.command()
@click.argument("name")
@click.option("--output", type=FOLDER, required=True, help="New folder for the pictures.")
@click.option("--split", help="Split to write.  [default: train, or the only one]")
@skip_option
@verbose_option
def download(*, name: str, output: Path, split: str | None, skip_bad_files: bool) -> None:
    """Write the set NAME of the Hugging Face hub to a folder of pictures.

    Captions are in its metadata.jsonl; a set of classes becomes class folders.
    """
    from nsp.data.download import download as download_set

    found = download_set(name, output, split=split, skip_bad_files=skip_bad_files)
    click.echo(f"{output}: {len(found)} pictures")
    click.echo(f"next: python train.py --data {shlex.quote(str(output))}, and the preset")


@data.command()
@source_argument
@output_dir_option("outputs/data", "Folder for stats.json and samples.png.")
@seed_option("Seed of the pictures on the sheet.")
@json_option
@verbose_option
def stats(*, source: str, output_dir: Path, seed: int, as_json: bool) -> None:
    """Count the samples of SOURCE, list unusable files, and draw a sample sheet."""
    from nsp.console.terminal import results_console
    from nsp.data.report import summary
    from nsp.data.sources import survey
    from nsp.data.stats import collect, write_stats
    from nsp.errors import one_line

    found = survey(source)
    result = collect(found)
    sheet = write_stats(result, found, output_dir, seed=seed)
    if as_json:
        print_json(result.to_dict())
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(result, summary(found.problems)):
        table.add_row(name, one_line(value))
    results_console().print(table)
    click.echo(f"sample sheet: {sheet}")


@data.command()
@source_argument
@click.option("--checkpoint", type=FOLDER, required=True, help="Model whose tokenizer to use.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="File to write (.safetensors), or the folder of codes of crops.",
)
@click.option("--ten-crop", is_flag=True, help="Ten crops of every picture, as files of codes.")
@click.option(
    "--crop-range",
    nargs=2,
    type=float,
    help="Sides of the two squares that ten crops are cut of, over the side of a crop.  "
    "[default: 1.1 1.05]",
)
@click.option("--flip", is_flag=True, help="The picture and its mirror image, as files of codes.")
@click.option("--image-size", type=COUNT, help="Side of a crop in px.  [default: the model's]")
@click.option("--shard", metavar="I/N", help="Part I of N, from 0.  [default: as torchrun says]")
@skip_option
@verbose_option
def cache(
    *,
    source: str,
    checkpoint: Path,
    output: Path,
    ten_crop: bool,
    crop_range: tuple[float, float] | None,
    flip: bool,
    image_size: int | None,
    shard: str | None,
    skip_bad_files: bool,
) -> None:
    """Run a model's tokenizer over SOURCE once, for later runs (data.token_cache).

    With --ten-crop or --flip, OUTPUT is a folder with the codes of all crops, to train on in place
    of pictures; several processes share the work, and one that was stopped is run again.
    """
    from nsp.artifacts.checkpoint import read_checkpoint
    from nsp.data.dataset import ImageDataset
    from nsp.data.sources import open_source

    if crop_range is not None and not ten_crop:
        raise ConfigError("--crop-range is for --ten-crop; omit it, or add that")
    if (ten_crop or flip) and (output.suffix == ".safetensors" or output.is_file()):
        raise ConfigError(
            f"--output {output}: --ten-crop and --flip write a folder of codes; give its name"
        )
    record = read_checkpoint(checkpoint)
    system = record.load()
    found = open_source(source, skip_bad_files=skip_bad_files)
    if ten_crop or flip:
        from nsp.data.ten_crop import CROP_RANGES, Extraction

        part, num_parts = _share(shard)
        settings = Extraction(
            image_size_px=image_size or system.config.image_size_px,
            ten_crop=ten_crop,
            crop_ranges=crop_range or CROP_RANGES,
            flip=flip,
            part=part,
            num_parts=num_parts,
        )
        made = record.family.learner.write_codes(system, found, output, settings)
        click.echo(f"{output}: {made} of {len(found)} pictures in part {part} of {num_parts}")
        click.echo(f"next: python train.py --data {shlex.quote(str(output))}, and the preset")
        return
    if image_size or shard:
        raise ConfigError("--image-size and --shard are for --ten-crop and --flip; omit them")
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give the name of a file")
    pictures = ImageDataset(found, system.config.image_size_px, train=True, crop=False)
    record.family.learner.write_cache(system, pictures, output)
    click.echo(f"{output}: {len(pictures)} pictures, for runs with that model's preset or config")
    words = ["--start-from", str(checkpoint), "--from-phase", "predictor"]
    words += ["--data", source, "--token-cache", str(output)]
    words = ["python", "train.py", *words]
    click.echo(f"next: {shlex.join(words)}")


def _share(shard: str | None) -> tuple[int, int]:
    """Return this process's part and the number of parts: as given, or as torchrun says."""
    if shard is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    if found is None or int(found[2]) < 1:
        raise ConfigError(f"--shard {shard}: write it as I/N, such as 0/8")
    return int(found[1]), int(found[2])


def _rows(stats: "Stats", bad: str) -> Iterator[tuple[str, str]]:
    """Yield one line per known fact, none for unknown facts. `bad` summarizes the bad files."""
    width, height, words = stats.width_px, stats.height_px, stats.caption_words
    yield "samples", f"{stats.num_samples} ({stats.num_train} to train on)"
    yield "pictures", f"{stats.num_bytes / 1e6:.1f} MB"
    yield "width, px", f"{width.least:g} to {width.most:g}, median {width.median:g}"
    yield "height, px", f"{height.least:g} to {height.most:g}, median {height.median:g}"
    yield "sizes", _counter(stats.sizes, stats.num_sizes)
    if stats.num_captions:
        each = stats.captions_per_picture
        several = f", {each.least:g} to {each.most:g} per picture" if each.most > 1 else ""
        yield "captions", f"{stats.num_captions} different{several}"
        yield "caption words", f"{words.least:g} to {words.most:g}, mean {words.mean:.1f}"
        yield "vocabulary", _counter(stats.words, stats.num_words)
    else:
        yield "captions", "none"
    if stats.classes:
        yield "classes", _counter(stats.classes, len(stats.classes))
    for name, same in (
        ("same picture", stats.duplicate_pictures),
        ("same caption", stats.duplicate_captions),
    ):
        if same.num_groups:
            names = _names(same.groups[0])
            yield name, f"{same.num_extra} extra samples in {same.num_groups} groups, as {names}"
    held = stats.heldout
    if held.num_listed:
        only = f", {held.num_by_caption_only} by caption only" if held.num_by_caption_only else ""
        yield "held out", f"{held.num_listed} listed, {held.num_found} samples withheld{only}"
    if held.absent:
        yield "held out, absent", _names(held.absent)
    if held.same_picture:
        yield "held-out pictures", f"{_names(held.same_picture)}: also in training"
    if stats.problems:
        yield "cannot be used", f"{bad}; stats.json lists each"
    if stats.unused:
        yield "not used", _names(stats.unused)


def _counter(counts: dict[str, int], total: int) -> str:
    shown = [f"{name} ({count})" for name, count in list(counts.items())[:_SHOWN]]
    return f"{total}: {_names(shown, total)}"


def _names(names: Sequence[str], total: int | None = None) -> str:
    from nsp.data.report import first

    return first(names, _SHOWN, total)
