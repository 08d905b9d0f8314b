"""Makes the large set of pictures that a model is evaluated with: one .npz of an exact number.

samples/
  NAME.npz          arr_0 (N, H, W, 3) uint8, when all parts are there
  NAME.json         the settings that it was made with
  NAME.parts/       until then: 00000.npz, 00001.npz, … of 128 pictures each, with their settings

Several processes make different parts, on one machine or on several with a common file system. What
picture k shows follows from the seed and k alone. A part appears whole or not at all, so a run that
was stopped continues; the process that finishes last packs the parts.
"""

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp import values
from nsp.data.picture_archive import open_pictures, read_text, write_pictures
from nsp.errors import ConfigError, DataError
from nsp.family.order import Order, Sampling
from nsp.files import locked_file, read_json, write_file
from nsp.pipeline.orders import cut_batches
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.results import to_uint8

logger = logging.getLogger(__name__)

PART_SIZE = 128  # pictures that a killed process may lose
_SETTINGS = "settings.json"  # in a part
_PURPOSE = 0x5E7  # of the random numbers that choose a picture's class and seed
_LOCK_SECONDS = 0.2  # between two attempts to get the lock


@dataclass(frozen=True)
class Shard:
    """One of several processes: it makes every `count`-th part, from `index` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(
                f"shard {self.index}/{self.count} does not exist; the shards of {self.count} "
                f"processes are 0/{self.count} to {self.count - 1}/{self.count}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleSet:
    """What is wanted: a number of pictures of a model, their classes, and where they are written.

    `labels` are the classes of all pictures; None draws them uniformly. Raises ConfigError for a
    model that takes prompts, and for classes that do not fit.
    """

    pipeline: Pipeline
    folder: Path
    num_images: int
    seed: int = 0
    sampling: Sampling | None = None  # None: the model's own
    labels: NDArray[np.int64] | None = None
    size_px: int | None = None  # None: the model's own
    name: str = field(init=False)

    def __post_init__(self) -> None:
        values.count("num_images", self.num_images)
        values.seed(self.seed)
        kind = self.pipeline.family.condition(self.pipeline.config)
        if kind == "prompt":
            raise ConfigError(
                "a set of samples has random classes, but this model takes prompts; use "
                "--prompts-file FILE --format npz"
            )
        if self.labels is not None:
            self._check_labels(self.labels, kind)
        family, config = self.pipeline.family, self.pipeline.config
        origin = self.pipeline.origin
        name = family.sample_name(
            config,
            self.chosen,
            model=self.pipeline.model_hash[:12] if origin is None else origin.path.name,
            size_px=config.image_size_px,
            size_eval_px=self.side_px,
            seed=self.seed,
        )
        object.__setattr__(self, "name", re.sub(r"[^\w.+=-]+", "-", name)[:200])
        self.pipeline.check_order(self.order(0))

    def _check_labels(self, labels: NDArray[np.int64], kind: str) -> None:
        if kind == "none":
            raise ConfigError("labels are given, but this model has no classes")
        if len(labels) != self.num_images:
            raise ConfigError(
                f"{len(labels)} labels are given for {self.num_images} pictures; give one for each"
            )
        wrong = (labels < 0) | (labels >= self.pipeline.config.num_classes)
        if wrong.any():
            place = int(wrong.argmax())
            raise ConfigError(
                f"label {place} is {labels[place]}; classes of this model are "
                f"0..{self.pipeline.config.num_classes - 1}"
            )

    @property
    def chosen(self) -> Sampling:
        """The settings of every picture."""
        chosen: Sampling = self.sampling or self.pipeline.sampling
        return chosen

    @property
    def side_px(self) -> int:
        """Height and width of the pictures."""
        side: int = self.size_px or self.pipeline.config.image_size_px
        return side

    @property
    def num_parts(self) -> int:
        """The number of parts; the last one may be shorter."""
        return -(-self.num_images // PART_SIZE)

    @property
    def archive(self) -> Path:
        """The file that is made in the end."""
        return self.folder / f"{self.name}.npz"

    def order(self, index: int) -> Order[Sampling]:
        """Return picture `index` of the set, which depends on the seed and its index alone."""
        key = np.array([self.seed, 0], np.uint64)
        counter = np.array([0, 0, index, _PURPOSE], np.uint64)
        random = np.random.Generator(np.random.Philox(key=key, counter=counter))
        seed = int(random.integers(2**63))
        if self.pipeline.family.condition(self.pipeline.config) == "none":
            return Order(None, seed, self.chosen)
        drawn = int(random.integers(self.pipeline.config.num_classes))
        label = drawn if self.labels is None else int(self.labels[index])
        return Order(label, seed, self.chosen)

    def settings(self) -> dict[str, Any]:
        """Return what decides the pixels of a picture besides its index, as plain values."""
        labels = "random"
        if self.labels is not None:
            labels = hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()
        return {
            "family": self.pipeline.family.name,
            "model": self.pipeline.model_hash,
            "backend": self.pipeline.backend.name,
            "precision": self.pipeline.precision,
            "sampling": self.chosen.to_dict(),
            "seed": self.seed,
            "labels": labels,
            "size_px": self.side_px,
        }

    def part(self, number: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"{self.name}.parts" / f"{number:05d}.npz"

    def part_images(self, number: int) -> range:
        """Return the indices of the pictures of a part."""
        start = number * PART_SIZE
        return range(start, min(start + PART_SIZE, self.num_images))


def make_samples(
    wanted: SampleSet,
    *,
    shard: Shard | None = None,
    batch_size: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Path | None:
    """Make this process's parts, and the archive if no part is missing then; return its path.

    Returns None if other processes still have parts to make. Parts and archives that are there are
    not made again. Raises ConfigError naming one that was made with other settings.
    """
    shard = shard or Shard()
    if shard.count > 1:
        _warn_of_other_shards(wanted)
    if _is_finished(wanted):
        logger.info("%s is there already", wanted.archive)
        return wanted.archive
    numbers = range(shard.index, wanted.num_parts, shard.count)
    left = [number for number in numbers if not _is_made(wanted, number)]
    if len(left) < len(numbers):
        logger.info("parts already there: %d of %d", len(numbers) - len(left), len(numbers))
    done, total = 0, sum(len(wanted.part_images(number)) for number in left)
    for number in left:
        for count in _make_part(wanted, number, batch_size):
            done += count
            if on_progress is not None:
                on_progress(f"images of shard {shard.index}/{shard.count}", done, total)
    return _pack(wanted)


def _warn_of_other_shards(wanted: SampleSet) -> None:
    """Warn of parts of the same pictures under another name: other shards of this set, perhaps.

    The name has the model's folder, so engines and their checkpoint, or two precisions of engines,
    give two sets, and neither would ever be complete.
    """
    own = wanted.settings()
    loose = ("backend", "precision")
    for folder in sorted(wanted.folder.glob("*.parts")):
        part = next((each for each in sorted(folder.glob("[0-9]*.npz"))), None)
        if part is None or folder == wanted.part(0).parent:
            continue
        try:
            found = json.loads(read_text(part, _SETTINGS))
        except (DataError, ValueError, OSError):
            continue  # not a part, or gone: its set is complete
        if all(found.get(name) == value for name, value in own.items() if name not in loose):
            logger.warning(
                "%s has parts of the same pictures, made by %s %s; this process makes another set, "
                "%s, by %s %s: run all shards of one set from the same folder",
                folder,
                *(found.get(name) for name in loose),
                wanted.name,
                *(own[name] for name in loose),
            )


def _make_part(wanted: SampleSet, number: int, batch_size: int | None) -> Iterator[int]:
    """Write one part; yields the number of pictures of every batch."""
    orders = [wanted.order(index) for index in wanted.part_images(number)]
    side = wanted.side_px
    pictures = np.empty((len(orders), side, side, 3), np.uint8)
    for places in cut_batches(wanted.pipeline, orders, batch_size):
        batch = [orders[place] for place in places]
        image = wanted.pipeline.images(batch, clipped=False)
        pictures[places] = to_uint8(image, size_px=side)
        yield len(places)
    texts = {_SETTINGS: json.dumps(wanted.settings())}
    shape = (len(orders), side, side, 3)
    write_pictures(wanted.part(number), [pictures], shape=shape, texts=texts)


def _is_made(wanted: SampleSet, number: int) -> bool:
    """Return whether a part is there; one that is damaged or shorter than now is made again."""
    path = wanted.part(number)
    if not path.exists():
        return False
    try:
        found = json.loads(read_text(path, _SETTINGS))
        count = open_pictures(path).shape[0]
    except (DataError, ValueError, FileNotFoundError) as error:
        logger.warning("%s is made again: %s", path, error)
        return False
    _check_settings(path, found, wanted.settings())
    return count >= len(wanted.part_images(number))


def _check_settings(path: Path, found: object, expected: Mapping[str, object]) -> None:
    """Raise ConfigError naming a file that was made with other settings, and one of these."""
    if found == expected:
        return
    before = found if isinstance(found, Mapping) else {}
    name = next((name for name in expected if before.get(name) != expected[name]), "model")
    raise ConfigError(
        f"{path} was made with other settings ({name} {values.shown(before.get(name))}, now "
        f"{values.shown(expected[name])}); choose another folder, or remove it"
    )


def _described(wanted: SampleSet) -> dict[str, Any]:
    return {**wanted.settings(), "num_images": wanted.num_images}


def _is_finished(wanted: SampleSet) -> bool:
    """Return whether the archive is there; ConfigError if it has other pictures."""
    if not wanted.archive.exists():
        return False
    try:
        found = read_json(wanted.archive.with_name(f"{wanted.name}.json"))
    except (OSError, ValueError):
        found = {}
    _check_settings(wanted.archive, found, _described(wanted))
    return True


def _pack(wanted: SampleSet) -> Path | None:
    """Write the archive if all parts are there and it is not; None if a part is missing.

    One process at a time looks: the last one to finish a part looks after that, and finds all.
    """
    lock = wanted.folder / f".{wanted.name}.lock"
    while True:
        with locked_file(lock) as held:
            if held:
                return _pack_alone(wanted, lock)
        time.sleep(_LOCK_SECONDS)


def _pack_alone(wanted: SampleSet, lock: Path) -> Path | None:
    """Do what `_pack` says; this process has the lock."""
    if not _is_finished(wanted):
        missing = [n for n in range(wanted.num_parts) if not _is_made(wanted, n)]
        if missing:
            logger.info("parts that other processes have to make: %d", len(missing))
            return None
        for left in wanted.folder.glob(f".{wanted.name}.npz.*.partial"):  # by a killed process
            left.unlink(missing_ok=True)
        side = wanted.side_px
        description = json.dumps(_described(wanted), indent=1) + "\n"
        # The archive comes last: without it, its description means nothing.
        with write_file(wanted.archive.with_name(f"{wanted.name}.json")) as partial:
            partial.write_text(description)
        shape = (wanted.num_images, side, side, 3)
        write_pictures(wanted.archive, _all_pictures(wanted), shape=shape)
    _remove_parts(wanted)
    lock.unlink(missing_ok=True)  # whoever waits for it will find the archive
    return wanted.archive


def _all_pictures(wanted: SampleSet) -> Iterator[NDArray[np.uint8]]:
    for number in range(wanted.num_parts):
        path, count = wanted.part(number), len(wanted.part_images(number))
        try:
            yield from open_pictures(path).blocks(PART_SIZE, most=count)
        except DataError as error:
            raise DataError(f"{error}, or remove it and run the same command again") from error


def _remove_parts(wanted: SampleSet) -> None:
    """Remove the parts, and what killed processes left of some; other files stay."""
    folder = wanted.part(0).parent
    for path in [*folder.glob("[0-9]*.npz"), *folder.glob(".[0-9]*.npz.*.partial")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
