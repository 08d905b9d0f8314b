"""`nsp bench --fidelity`: do the pictures show what their prompts name, also ones never trained on?

    captions (seen, held out) -> one image each -> nearest distinct picture of the set -> recall

The tokenizer's reconstructions of the same pictures are the ceiling.
"""

import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.artifacts.checkpoint import CheckpointRecord, read_checkpoint
from nsp.artifacts.manifest import Manifest, read_manifest
from nsp.artifacts.repair import find_source
from nsp.config import Config
from nsp.data.retrieval import PictureSet, Recall, at_side, psnr_db
from nsp.data.sheet import contact_sheet
from nsp.data.sources import ImageSource, survey
from nsp.errors import CheckpointError, ConfigError
from nsp.files import write_file
from nsp.pipeline.pipeline import Pipeline, load_pipeline

logger = logging.getLogger(__name__)

SCHEMA = 1
_SHOWN = 12  # captions of each split on the sheet
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class FidelityOptions:
    """What to measure."""

    engine_dir: Path
    output_dir: Path
    checkpoint: Path | None = None  # with the tokenizer's encoder; None: where the manifest says
    backend: str = "auto"
    precision: str | None = None
    source: str = "emoji"
    num_captions: int = 200
    seed: int = 0
    batch_size: int = 8
    guidance_until: int | None = None  # scales with guidance; None: as the model's settings say


@dataclass(frozen=True, kw_only=True)
class Split(Config):
    """The figures of one list of captions."""

    name: str  # "seen" or "held out"
    recall_at_1: Recall
    recall_at_5: Recall
    reconstruction_at_1: Recall | None  # None: no checkpoint to reconstruct with
    reconstruction_psnr_db: float | None  # median
    psnr_db: float  # median, of the generated picture against the named one


@dataclass(frozen=True, kw_only=True)
class Fidelity(Config):
    """The result, as fidelity.json has it."""

    schema_version: int
    model_hash: str
    backend: str
    precision: str
    source: str
    num_distinct: int
    seed: int
    sampling: dict[str, Any]
    splits: tuple[Split, ...]
    seconds_per_image: float

    def markdown(self) -> str:
        """Return the table for people."""
        lines = [
            "# Fidelity",
            "",
            f"Model {self.model_hash[:12]}, {self.backend} {self.precision}, "
            f"{self.num_distinct} distinct pictures of `{self.source}`, seed {self.seed}. "
            f"{self._guidance()}A hit means that the nearest picture (mean squared distance at 64 "
            "px) is the one that the prompt names. 95 % intervals.",
            "",
            "| captions | count | recall@1 | recall@5 | reconstruction recall@1 | PSNR, dB | "
            "reconstruction PSNR, dB |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for split in self.splits:
            ceiling = split.reconstruction_at_1 or "-"
            psnr = split.reconstruction_psnr_db
            lines.append(
                f"| {split.name} | {split.recall_at_1.count} | {split.recall_at_1} | "
                f"{split.recall_at_5} | {ceiling} | {split.psnr_db:.1f} | "
                f"{'-' if psnr is None else f'{psnr:.1f}'} |"
            )
        return "\n".join(lines) + "\n"

    def _guidance(self) -> str:
        until = self.sampling.get("guidance_until")
        return "" if until is None else f"`guidance_until` is {until}. "


def _tokenizer_of(options: FidelityOptions, manifest: Manifest) -> CheckpointRecord | None:
    """Return the checkpoint whose tokenizer reconstructs pictures; None where it is not here."""
    try:
        return read_checkpoint(options.checkpoint or find_source(options.engine_dir, manifest))
    except CheckpointError as error:
        if options.checkpoint is not None:
            raise
        logger.warning("no results for the tokenizer alone: %s", error)
        return None


def run(options: FidelityOptions, *, on_step: OnStep = lambda *_: None) -> Fidelity:
    """Return the figures, written as fidelity.json, .md and .png to `output_dir`.

    Raises ConfigError for a model without prompts or a source without held-out captions.
    """
    manifest = read_manifest(options.engine_dir)
    pipeline = load_pipeline(options.engine_dir, options.backend, precision=options.precision)
    if pipeline.tokenizer is None:
        raise ConfigError(
            f"{options.engine_dir} takes no prompts, but fidelity is measured with prompts"
        )
    if options.guidance_until is not None:
        until = {"guidance_until": options.guidance_until}
        pipeline.sampling = pipeline.sampling.changed(until)
    found = survey(options.source)
    pictures = PictureSet.of(found.choose("all"))
    record = _tokenizer_of(options, manifest)
    splits, rows, started, count = [], [], time.perf_counter(), 0
    for name, source in (("seen", found.choose("train")), ("held out", found.choose("heldout"))):
        picks = _picks(source, options)
        images = _generate(pipeline, source, picks, options, lambda *a, n=name: on_step(n, *a))
        count += len(images)
        splits.append(_split(name, source, picks, images, pictures, record))
        rows += _rows(source, picks, images, pictures)
    result = Fidelity(
        schema_version=SCHEMA,
        model_hash=manifest.model_hash,
        backend=pipeline.backend.name,
        precision=pipeline.precision,
        source=options.source,
        num_distinct=len(pictures.pixels),
        seed=options.seed,
        sampling=pipeline.sampling.to_dict(),
        splits=tuple(splits),
        seconds_per_image=(time.perf_counter() - started) / max(count, 1),
    )
    _write(result, rows, options.output_dir)
    return result


def _picks(source: ImageSource, options: FidelityOptions) -> list[int]:
    """Return the samples to ask for: as many as wanted, spread over the set by the seed."""
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(source))[: options.num_captions]
    return sorted(int(index) for index in order)


def _generate(
    pipeline: Pipeline,
    source: ImageSource,
    picks: Sequence[int],
    options: FidelityOptions,
    on_done: Callable[[int, int], None],
) -> list[NDArray[np.uint8]]:
    size = min(options.batch_size, pipeline.max_batch or options.batch_size)
    images: list[NDArray[np.uint8]] = []
    for start in range(0, len(picks), size):
        prompts = [source.samples[index].caption for index in picks[start : start + size]]
        result = pipeline.generate(prompts=prompts, seed=options.seed)
        images += list(result.images)
        on_done(len(images), len(picks))
    return images


def _split(
    name: str,
    source: ImageSource,
    picks: Sequence[int],
    images: Sequence[NDArray[np.uint8]],
    pictures: PictureSet,
    record: CheckpointRecord | None,
) -> Split:
    names = [source.samples[index].name for index in picks]
    truths = [pictures.picture(each) for each in names]
    ranks = pictures.ranks(images, names)
    rebuilt_recall = rebuilt_psnr = None
    if record is not None:
        system = record.load()
        sized = [at_side(truth, system.config.image_size_px) for truth in truths]
        kept = record.family.learner.reconstruct(system, np.stack(sized))
        rebuilt = [at_side(picture) for picture in kept]
        rebuilt_recall = Recall.at(pictures.ranks(rebuilt, names), 1)
        rebuilt_psnr = statistics.median(map(psnr_db, rebuilt, truths))
    return Split(
        name=name,
        recall_at_1=Recall.at(ranks, 1),
        recall_at_5=Recall.at(ranks, 5),
        reconstruction_at_1=rebuilt_recall,
        reconstruction_psnr_db=rebuilt_psnr,
        psnr_db=statistics.median(map(psnr_db, map(at_side, images), truths)),
    )


def _rows(
    source: ImageSource,
    picks: Sequence[int],
    images: Sequence[NDArray[np.uint8]],
    pictures: PictureSet,
) -> list[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Return caption, truth and generated picture of a few captions."""
    every = max(1, len(picks) // _SHOWN)
    shown = list(range(0, len(picks), every))[:_SHOWN]
    samples = [source.samples[picks[index]] for index in shown]
    return [
        (sample.caption, pictures.picture(sample.name), at_side(images[index]))
        for sample, index in zip(samples, shown, strict=True)
    ]


def _write(
    result: Fidelity,
    rows: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]],
    folder: Path,
) -> None:
    with write_file(folder / "fidelity.json") as partial:
        partial.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    with write_file(folder / "fidelity.md") as partial:
        partial.write_text(result.markdown())
    pairs = [picture for _, truth, made in rows for picture in (truth, made)]
    titles = [title for caption, _, _ in rows for title in (caption, "generated")]
    with write_file(folder / "fidelity.png") as partial:
        contact_sheet(pairs, titles, columns=8).save(partial, "PNG")
