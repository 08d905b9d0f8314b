"""`nsp clip-score`: pictures with captions, and a CLIP, become one figure."""

import dataclasses
from pathlib import Path

import click

from nsp.console.command_line import Verb
from nsp.console.common_options import (
    COUNT,
    FILE,
    FOLDER,
    json_option,
    threads_option,
    torch_threads,
    verbose_option,
)
from nsp.console.evaluate_verb import chosen_device
from nsp.console.terminal import print_json


@click.command("clip-score", cls=Verb)
@click.argument("pictures", type=click.Path(path_type=Path, exists=True), metavar="PICTURES")
@click.option(
    "--clip",
    type=FOLDER,
    help="Folder of a whole CLIP as transformers saves it, with its tokenizer.",
)
@click.option("--captions", type=FILE, help="Text file with one caption per picture.")
@click.option("--batch-size", type=COUNT, default=32, show_default=True, help="Pictures at once.")
@click.option("--device", help="cpu or cuda.  [default: a GPU if there is one]")
@threads_option("CPU threads.")
@json_option
@verbose_option
def clip_score(
    *,
    pictures: Path,
    clip: Path | None,
    captions: Path | None,
    batch_size: int,
    device: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Tell how well PICTURES fit their captions: the mean of 100 max(cos, 0) by a CLIP.

    PICTURES is a folder, as nsp generate writes it (the prompt is in every file) or with NAME.txt
    beside NAME.png, or an .npz; --captions gives the captions in the order of names or of the
    archive. Nothing is downloaded.
    """
    from nsp.console.terminal import progress_bar
    from nsp.evaluation.captioned_pictures import open_captioned
    from nsp.evaluation.clip import load_clip
    from nsp.evaluation.clip_score import clip_score as compute

    chosen = chosen_device(device)
    loaded = load_clip(clip, chosen)
    found = open_captioned(pictures, captions)
    with progress_bar() as show, torch_threads(threads):
        result = compute(found, loaded, batch_size=batch_size, on_progress=show)
    if as_json:
        print_json({"pictures": str(pictures), "clip": str(clip), **dataclasses.asdict(result)})
        return
    click.echo(
        f"CLIP score {result.clip_score:.2f}, {result.definition} of {result.num_pictures:,} "
        f"pictures, by {clip}"
    )
