"""Generates a run of images into a folder: PNGs with their metadata, and a contact sheet.

outputs/
  000_red-apple_seed0.png                  one file per image
  contact_sheet.png                        all of them, titled
  scales/000_red-apple_seed0_scale1.png    the picture after every scale, when asked for
"""

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.data.png import slug, write_image, write_png
from nsp.data.sheet import contact_sheet
from nsp.distribution import version
from nsp.family.sampling import SamplingConfig
from nsp.pipeline.batches import PlannedImage, check_images, cut_batches, stream_batch
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.results import StreamStep, to_uint8

logger = logging.getLogger(__name__)

CONTACT_SHEET_NAME = "contact_sheet.png"
_MAX_SHEET = 128  # pictures on a contact sheet: it is held in memory


@dataclass(frozen=True)
class GalleryProgress:
    """What is done after one scale step."""

    images_done: int  # by earlier batches
    images: int  # of the run
    batch: int  # images of this batch
    scale: int  # finished scales of this batch
    num_scales: int

    @property
    def activity(self) -> str:
        """What is being made."""
        first, last = self.images_done + 1, self.images_done + self.batch
        which = str(first) if first == last else f"{first}-{last}"
        return f"image {which} of {self.images}: scales"


@dataclass(frozen=True)
class WrittenImage:
    """One image on disk."""

    planned: PlannedImage
    path: Path
    ms: float  # time of its batch divided by the images in it, without writing
    warm: bool  # False in the first batch: its time has what the backend still loads in it


@dataclass(frozen=True)
class Gallery:
    """What a run left on disk."""

    images: tuple[WrittenImage, ...]
    contact_sheet: Path

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for programs: the images in order, and the contact sheet."""
        images = [
            {
                **_condition(written.planned),
                "seed": written.planned.seed,
                "path": str(written.path),
                "ms": round(written.ms, 3),
                "warm": written.warm,
            }
            for written in self.images
        ]
        return {"images": images, "contact_sheet": str(self.contact_sheet)}


def generate_gallery(
    pipeline: Pipeline,
    planned: Sequence[PlannedImage],
    folder: Path,
    *,
    batch_size: int,
    save_intermediates: bool = False,
    last_scale: int | None = None,
    on_step: Callable[[GalleryProgress], None] | None = None,
    **sampling: Any,
) -> Gallery:
    """Generate `planned` in batches and write every image as soon as it is done.

    `sampling` as for `Pipeline.generate`. With `last_scale` the images are what that scale decodes
    to, and later ones are not made. All conditions and the folder are checked before the
    first step. Raises ConfigError for a bad request, OSError when the folder cannot be written.
    """
    settings = pipeline.sampling.changed(sampling)
    check_images(pipeline, planned)
    batches = cut_batches(planned, batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            errno.EACCES, "is not writable; choose another --output-dir", str(folder)
        )
    shared = _shared_metadata(pipeline, settings)
    written: list[WrittenImage] = []
    shown: list[NDArray[np.uint8]] = []
    for batch in batches:
        names = [f"{i.index:03d}_{slug(i.title)}_seed{i.seed}" for i in batch]
        seconds = 0.0
        last: StreamStep | None = None
        started = time.perf_counter()
        for last in stream_batch(pipeline, batch, **sampling):
            seconds += time.perf_counter() - started
            if on_step is not None:
                done, count = last.scale + 1, len(batch)
                on_step(GalleryProgress(len(written), len(planned), count, done, last.num_scales))
            if save_intermediates:
                _write_scale(folder / "scales", names, last)
            started = time.perf_counter()
            if last.scale == last_scale:
                break
        assert last is not None  # a schedule has at least one scale
        pictures = to_uint8(last.decode())
        ms = 1e3 * (seconds + time.perf_counter() - started) / len(batch)
        for image, name, picture in zip(batch, names, pictures, strict=True):
            path = folder / f"{name}.png"
            write_png(path, picture, {**_metadata(image), **shared})
            written.append(WrittenImage(image, path, ms, warm=image.index >= batch_size))
        shown.extend(pictures[: _MAX_SHEET - len(shown)])
    return Gallery(tuple(written), _write_sheet(folder, planned, shown))


def _write_scale(folder: Path, names: Sequence[str], step: StreamStep) -> None:
    """Write the pictures of the latent after one scale."""
    for name, picture in zip(names, to_uint8(step.decode()), strict=True):
        write_png(folder / f"{name}_scale{step.scale + 1}.png", picture)


def _write_sheet(
    folder: Path, planned: Sequence[PlannedImage], pictures: Sequence[NDArray[np.uint8]]
) -> Path:
    """Write the contact sheet; seeds are in the titles where they differ."""
    shown = planned[: len(pictures)]
    if len(shown) < len(planned):
        logger.warning(
            "the contact sheet shows the first %d of %d images", len(shown), len(planned)
        )
    several = len({image.seed for image in shown}) > 1
    titles = [f"{i.title} (seed {i.seed})" if several else i.title for i in shown]
    path = folder / CONTACT_SHEET_NAME
    write_image(path, contact_sheet(pictures, titles))
    return path


def _metadata(image: PlannedImage) -> dict[str, str]:
    """Return what one image adds to the metadata."""
    return {name: str(value) for name, value in {**_condition(image), "seed": image.seed}.items()}


def _condition(image: PlannedImage) -> dict[str, str | int | None]:
    """Return what the image should show, by the name of its kind."""
    if image.prompt is not None:
        return {"prompt": image.prompt}
    return {"class_id": image.class_id}


def _shared_metadata(pipeline: Pipeline, settings: SamplingConfig) -> dict[str, str]:
    """Return the metadata that all images of a run have."""
    return {
        "sampling": json.dumps(settings.to_dict()),
        "family": pipeline.family.name,
        "model": pipeline.model_hash,
        "backend": pipeline.backend.name,
        "Software": " ".join(filter(None, ("nsp", version()))),
    }
