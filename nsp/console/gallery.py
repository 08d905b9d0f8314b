"""Generates images into a folder: files with metadata, and a contact sheet.

outputs/
  000_red-apple_seed0.png                  one file per image; or .webp, .jpeg
  contact_sheet.png                        all of them, titled
  scales/000_red-apple_seed0_scale1.png    the picture after every scale, if requested; models
                                           of another kind have tokens/ or timesteps/
  images.npz                               instead of files: arr_0 (N, H, W, 3) uint8

A file that is already there, made by the same model with the same settings, is not made again.
"""

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nsp.data.bounds import MAX_PICTURE_BYTES, read_regular
from nsp.data.image_files import Format, metadata_in, slug, write_image, write_picture
from nsp.data.sheet import CONTACT_SHEET_NAME, contact_sheet
from nsp.distribution import version
from nsp.errors import ConfigError, DataError
from nsp.family.order import Order, Sampling, Unit
from nsp.files import write_file
from nsp.pipeline.orders import cut_batches
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.results import StreamStep, to_uint8

logger = logging.getLogger(__name__)

ARCHIVE_NAME = "images.npz"
_UNITS: Mapping[Unit, str] = {
    "scale": "scales",
    "row": "rows",
    "tokens": "tokens",
    "timestep": "timesteps",
}
_ANY_VERSION = {"Software": ""}  # which may be newer than that of a file
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
    ms: float | None  # time of its batch divided by the images in it; None: it was there already
    warm: bool  # False in the first batch: its time includes loading by the backend


@dataclass(frozen=True)
class Gallery:
    """The files that a run wrote."""

    images: tuple[WrittenImage, ...]
    contact_sheet: Path | None  # None: not wanted

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for programs: the images in order, and the contact sheet."""
        images = [
            {
                **_condition(written.order),
                "seed": written.order.seed,
                "path": str(written.path),
                "ms": None if written.ms is None else round(written.ms, 3),
                "warm": written.warm,
            }
            for written in self.images
        ]
        sheet = self.contact_sheet and str(self.contact_sheet)
        return {"images": images, "contact_sheet": sheet}


def generate_gallery(
    pipeline: Pipeline,
    orders: Sequence[Order[Sampling]],
    folder: Path,
    *,
    batch_size: int,
    save_intermediates: bool = False,
    kind: Format | Literal["npz"] = "png",
    sheet: bool = True,
    size_px: int | None = None,
    on_step: Callable[[GalleryProgress], None] | None = None,
) -> Gallery:
    """Generate all orders in batches and write every image as soon as it is done.

    With `size_px`, pictures are resized to that side, intermediate ones are not. All orders, the
    folder and the places of its files are checked before the first step. Raises ConfigError for a
    bad order, OSError when the folder or one of the files cannot be written.
    """
    for order in orders:
        pipeline.check_order(order)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            errno.EACCES, "is not writable; choose another --output-dir", str(folder)
        )
    shared = _shared_metadata(pipeline, size_px)
    metadata = [{**_metadata(order), **shared} for order in orders]
    names = [f"{p:03d}_{slug(_title(o))}_seed{o.seed}" for p, o in enumerate(orders)]
    paths = [folder / (ARCHIVE_NAME if kind == "npz" else f"{name}.{kind}") for name in names]
    _check_places([*paths, *([folder / CONTACT_SHEET_NAME] if sheet else [])])
    written: dict[int, WrittenImage] = {}
    made: dict[int, NDArray[np.uint8]] = {}
    if kind != "npz" and not save_intermediates:
        for place, found in enumerate(map(_made_before, paths, metadata)):
            if found is not None:
                written[place] = WrittenImage(orders[place], paths[place], None, warm=True)
                made |= {place: found} if place < _MAX_SHEET else {}
    if written:
        logger.info("images already there with the same settings: %d", len(written))
    left = [place for place in range(len(orders)) if place not in written]
    batches = cut_batches(pipeline, [orders[place] for place in left], batch_size) if left else []
    for number, chosen in enumerate(batches):
        places = [left[place] for place in chosen]
        batch = [orders[place] for place in places]
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
                here = [names[place] for place in places]
                _write_step(folder / _UNITS[step.unit], here, step.unit, last)
            started = time.perf_counter()
        assert last is not None  # a loop has at least one step
        pictures = to_uint8(last.decode(clipped=False), size_px=size_px)
        ms = 1e3 * (seconds + time.perf_counter() - started) / len(batch)
        for place, picture in zip(places, pictures, strict=True):
            if kind != "npz":
                write_picture(paths[place], picture, metadata[place])
            written[place] = WrittenImage(orders[place], paths[place], ms, warm=number > 0)
            if place < _MAX_SHEET or kind == "npz":
                made[place] = picture
    ordered = [made[place] for place in sorted(made)]
    if kind == "npz":
        _write_archive(folder / ARCHIVE_NAME, ordered, metadata)
    images = tuple(written[place] for place in range(len(orders)))
    return Gallery(images, _write_sheet(folder, orders, ordered[:_MAX_SHEET]) if sheet else None)


def _check_places(paths: Sequence[Path]) -> None:
    """Raise IsADirectoryError when there is a folder where a file is to be written."""
    for path in paths:
        if path.is_dir():
            problem = "is a folder, but a file is to be written there; move it, or choose another "
            raise IsADirectoryError(errno.EISDIR, f"{problem}--output-dir", str(path))


def _made_before(path: Path, metadata: Mapping[str, str]) -> NDArray[np.uint8] | None:
    """Return the pixels of a file that the same model made with the same settings, if there is."""
    if not path.is_file():
        return None
    from nsp.data.pictures import decode_rgb  # 3 ms that the first run need not spend

    try:
        content = read_regular(path, most_bytes=MAX_PICTURE_BYTES)
        if {**metadata_in(content), **_ANY_VERSION} != {**metadata, **_ANY_VERSION}:
            return None
        return np.asarray(decode_rgb(content))
    except (OSError, DataError):  # not a whole picture: it is made again
        return None


def _write_archive(
    path: Path, pictures: Sequence[NDArray[np.uint8]], metadata: Sequence[Mapping[str, str]]
) -> None:
    """Write all pictures as arr_0 (N, H, W, 3), as evaluators read them, and their metadata."""
    if len({picture.shape for picture in pictures}) > 1:
        raise ConfigError("--format npz is one array, but the pictures have several sizes")
    with write_file(path) as partial, partial.open("wb") as file:
        np.savez(file, np.stack(pictures), metadata=np.array([json.dumps(m) for m in metadata]))


def _write_step(folder: Path, names: Sequence[str], unit: Unit, step: StreamStep) -> None:
    """Write the pictures of the latent after one step."""
    for name, picture in zip(names, to_uint8(step.decode()), strict=True):
        write_picture(folder / f"{name}_{unit}{step.scale + 1}.png", picture)


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
    for name, array in order.given.items():  # the image cannot be made again without it
        settings[name] = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return {**{name: str(value) for name, value in _condition(order).items()}, **settings}


def _condition(order: Order[Sampling]) -> dict[str, str | int]:
    """Return what the image should show, under the name of its kind."""
    if order.condition is None:
        return {}
    kind = "prompt" if isinstance(order.condition, str) else "class_id"
    return {kind: order.condition}


def _shared_metadata(pipeline: Pipeline, size_px: int | None) -> dict[str, str]:
    """Return the metadata common to all images of a run."""
    return {
        **({} if size_px is None else {"image_size_eval": str(size_px)}),
        "family": pipeline.family.name,
        "model": pipeline.model_hash,
        "backend": pipeline.backend.name,
        "precision": pipeline.precision,
        "Software": " ".join(filter(None, ("nsp", version()))),
    }
