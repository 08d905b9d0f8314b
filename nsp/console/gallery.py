"""Generates images into a folder: PNG files with metadata, and a contact sheet.

outputs/
  000_red-apple_seed0.png                  one file per image
  contact_sheet.png                        all of them, titled
  scales/000_red-apple_seed0_scale1.png    the picture after every scale, if requested; models
                                           of another kind have tokens/ or timesteps/
"""

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.data.image_files import slug, write_image, write_png
from nsp.data.sheet import contact_sheet
from nsp.distribution import version
from nsp.family.order import Order, Sampling, Unit
from nsp.pipeline.orders import cut_batches
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.results import StreamStep, to_uint8

logger = logging.getLogger(__name__)

CONTACT_SHEET_NAME = "contact_sheet.png"
_UNITS: Mapping[Unit, str] = {"scale": "scales", "tokens": "tokens", "timestep": "timesteps"}
_MAX_SHEET = 128  # pictures on a contact sheet, which must fit into memory


@dataclass(frozen=True)
class GalleryProgress:
    """The progress after one scale step."""

    images_done: int  # by earlier batches
    images: int  # of the run
    batch: int  # images of this batch
    scale: int  # finished steps of this batch
    num_scales: int
    unit: Unit = "scale"  # of the steps

    @property
    def activity(self) -> str:
        """The current activity in words."""
        first, last = self.images_done + 1, self.images_done + self.batch
        which = str(first) if first == last else f"{first}-{last}"
        return f"image {which} of {self.images}: {_UNITS[self.unit]}"


@dataclass(frozen=True)
class WrittenImage:
    """One image on disk."""

    order: Order[Sampling]
    path: Path
    ms: float  # time of its batch divided by the images in it, without writing
    warm: bool  # False in the first batch: its time includes loading by the backend


@dataclass(frozen=True)
class Gallery:
    """The files that a run wrote."""

    images: tuple[WrittenImage, ...]
    contact_sheet: Path

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for programs: the images in order, and the contact sheet."""
        images = [
            {
                **_condition(written.order),
                "seed": written.order.seed,
                "path": str(written.path),
                "ms": round(written.ms, 3),
                "warm": written.warm,
            }
            for written in self.images
        ]
        return {"images": images, "contact_sheet": str(self.contact_sheet)}


def generate_gallery(
    pipeline: Pipeline,
    orders: Sequence[Order[Sampling]],
    folder: Path,
    *,
    batch_size: int,
    save_intermediates: bool = False,
    on_step: Callable[[GalleryProgress], None] | None = None,
) -> Gallery:
    """Generate all orders in batches and write every image as soon as it is done.

    All orders and the folder are checked before the first step. Raises ConfigError for a bad order,
    OSError when the folder cannot be written.
    """
    for order in orders:
        pipeline.check_order(order)
    batches = cut_batches(pipeline, orders, batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            errno.EACCES, "is not writable; choose another --output-dir", str(folder)
        )
    shared = _shared_metadata(pipeline)
    written: dict[int, WrittenImage] = {}
    shown: dict[int, NDArray[np.uint8]] = {}
    for number, places in enumerate(batches):
        batch = [orders[place] for place in places]
        names = [f"{p:03d}_{slug(_title(orders[p]))}_seed{orders[p].seed}" for p in places]
        seconds = 0.0
        last: StreamStep | None = None
        started = time.perf_counter()
        for step in pipeline.run(batch):
            last = StreamStep(step.index, step.total, pipeline, step)
            seconds += time.perf_counter() - started
            if on_step is not None:
                done, count = step.index + 1, len(batch)
                progress = GalleryProgress(
                    len(written), len(orders), count, done, step.total, step.unit
                )
                on_step(progress)
            if save_intermediates and step.latent is not None:
                _write_step(folder / _UNITS[step.unit], names, step.unit, last)
            started = time.perf_counter()
        assert last is not None  # a loop has at least one step
        pictures = to_uint8(last.decode())
        ms = 1e3 * (seconds + time.perf_counter() - started) / len(batch)
        for place, name, picture in zip(places, names, pictures, strict=True):
            path = folder / f"{name}.png"
            write_png(path, picture, {**_metadata(orders[place]), **shared})
            written[place] = WrittenImage(orders[place], path, ms, warm=number > 0)
            if place < _MAX_SHEET:
                shown[place] = picture
    images = tuple(written[place] for place in range(len(orders)))
    sheet = _write_sheet(folder, orders, [shown[place] for place in sorted(shown)])
    return Gallery(images, sheet)


def _write_step(folder: Path, names: Sequence[str], unit: Unit, step: StreamStep) -> None:
    """Write the pictures of the latent after one step."""
    for name, picture in zip(names, to_uint8(step.decode()), strict=True):
        write_png(folder / f"{name}_{unit}{step.scale + 1}.png", picture)


def _write_sheet(
    folder: Path, planned: Sequence[Order[Sampling]], pictures: Sequence[NDArray[np.uint8]]
) -> Path:
    """Write the contact sheet; titles have the seeds if these differ."""
    shown = planned[: len(pictures)]
    if len(shown) < len(planned):
        logger.warning(
            "the contact sheet shows the first %d of %d images", len(shown), len(planned)
        )
    several = len({order.seed for order in shown}) > 1
    titles = [f"{_title(o)} (seed {o.seed})" if several else _title(o) for o in shown]
    path = folder / CONTACT_SHEET_NAME
    write_image(path, contact_sheet(pictures, titles))
    return path


def _title(order: Order[Sampling]) -> str:
    """Return what an image should show, in words."""
    if isinstance(order.condition, str):
        return order.condition or "no prompt"
    return "image" if order.condition is None else f"class {order.condition}"


def _metadata(order: Order[Sampling]) -> dict[str, str]:
    """Return the metadata of one image."""
    settings = {"seed": str(order.seed), "sampling": json.dumps(order.sampling.to_dict())}
    if order.negative is not None:
        settings["negative_prompt"] = order.negative
    return {**{name: str(value) for name, value in _condition(order).items()}, **settings}


def _condition(order: Order[Sampling]) -> dict[str, str | int]:
    """Return what the image should show, under the name of its kind."""
    if order.condition is None:
        return {}
    kind = "prompt" if isinstance(order.condition, str) else "class_id"
    return {kind: order.condition}


def _shared_metadata(pipeline: Pipeline) -> dict[str, str]:
    """Return the metadata common to all images of a run."""
    return {
        "family": pipeline.family.name,
        "model": pipeline.model_hash,
        "backend": pipeline.backend.name,
        "Software": " ".join(filter(None, ("nsp", version()))),
    }
