"""Streams pictures from tar shards, for sets too large to list; resumes exactly.

endless list of shards   every epoch's permutation, one after the other
-> lane                  every (world_size x num_lanes)-th of that list
-> samples               samples of the lane's shards, shuffled in blocks that end with the epoch
-> batches               `batch_size` samples each; step k of a rank comes from lane k % num_lanes
-> worker                steps first, first + num_workers, ..., as DataLoader collects them
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nsp.data.crops import Crop
from nsp.data.pictures import decode_rgb
from nsp.data.reading_ahead import leave_signals_to_parent
from nsp.data.samples import Problem, drawn_caption
from nsp.data.shards import RawSample, ShardReader, ShardSet, find_shards, wrong_sizes
from nsp.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

MAX_LANES = 8  # default limit; a power of two, like most numbers of workers
MAX_EMPTY_EPOCHS = 20  # empty epochs of a lane, in a row, before a set counts as empty
_MAX_WORKERS = 1024  # workers that can count the samples they leave out


class StreamItem(TypedDict):
    """One picture as training sees it."""

    image: Tensor  # uint8 (3, H, W)
    caption: str
    class_id: int  # -1 means no class
    key: str


class ShardStream(IterableDataset[StreamItem]):
    """The training samples of tar shards as StreamItems, H = W = image_size_px, cut as `Crop` says.

    Guarantees, as long as the shards do not change:

    - With `train`, it never ends. The batch of step k on one rank depends only on (shards, seed,
      batch_size, rank, world_size, num_lanes, shuffle_buffer, k), not on the number of DataLoader
      workers or on `start_step`, the first step to be yielded. Skipping the steps before decodes
      nothing; shards with a length in `index.json` are not even opened.
      - Over all ranks, every sample comes once in every epoch. Ranks (and lanes) may be in
        different
      epochs: they drift apart if shards differ in length.
      - No held-out sample is served, whether held out by name or by caption.
      - A file that cannot be used raises a DataError that names it. With `skip_bad_files` it gives
        a
      warning and counts in `num_left_out`. If a sample fails to decode, another sample of its batch
      takes its place, so that no later batch moves.
      - Without `train`, every sample comes once, in order, and the stream ends.

    Each shard is read by one worker if the number of workers divides `num_lanes`, otherwise by
    several. Iterate it through `loader`: a DataLoader must have the same batch size, and nothing
    may split or shuffle it again (accelerate's `prepare` would).
    """

    def __init__(
        self,
        spec: str | Path | ShardSet,
        image_size_px: int,
        *,
        batch_size: int,
        train: bool,
        crop: bool,
        flip: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        skip_bad_files: bool = False,
        num_lanes: int | None = None,
        shuffle_buffer: int = 512,
    ) -> None:
        """Find the shards; no samples are read yet (see find_shards for held-out ones).

        `batch_size` is that of one rank; `num_lanes` None is the largest power of two up to 8 with
        a shard for every lane of every rank; each lane keeps `shuffle_buffer` undecoded samples.
        Raises ConfigError for numbers that do not fit, DataError for shards that are missing or
        have another size than in index.json.
        """
        super().__init__()
        _check_numbers(batch_size, rank, world_size, start_step, shuffle_buffer)
        self.shards = spec if isinstance(spec, ShardSet) else find_shards(spec)
        self.batch_size, self.start_step = batch_size, start_step
        self.train, self.seed, self.skip_bad_files = train, seed, skip_bad_files
        self.num_lanes = _choose_lanes(len(self.shards.urls), world_size, num_lanes, train)
        self._rank, self._world_size = rank, world_size
        self._block = shuffle_buffer if train else 1
        self._squares = Crop(
            image_size_px=image_size_px, train=train, crop=crop, flip=flip, seed=seed
        )
        self._reader = ShardReader(self.shards)
        self._left_out = torch.zeros(_MAX_WORKERS, dtype=torch.int64)
        self._left_out.share_memory_()  # workers count here
        self._warned: set[str] = set()
        # The counts in index.json are right only if every sample is used.
        records = {} if skip_bad_files else self.shards.records
        if not skip_bad_files and (wrong := wrong_sizes(self.shards)):
            raise DataError(
                f"{len(wrong)} shards are not as they were packed, first {wrong[0]}; restore it, "
                "or train on the usable samples with --skip-bad-files"
            )
        self._lengths = {url: record.num_train for url, record in records.items()}

    @property
    def num_left_out(self) -> int:
        """How many samples and shards were left out so far, by all workers.

        A sample left out again in another epoch counts again.
        """
        return int(self._left_out.sum())

    def in_order(self) -> "ShardStream":
        """Return every training sample once, in order, without random crops, to look at."""
        return ShardStream(
            self.shards,
            self._squares.image_size_px,
            batch_size=self.batch_size,
            train=False,
            crop=self._squares.crop,
            skip_bad_files=self.skip_bad_files,
        )

    def loader(self, *, num_workers: int = 0, pin_memory: bool = False) -> DataLoader[Any]:
        """Return the batches from `start_step` on."""
        return DataLoader(
            self,
            batch_size=self.batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # torch's global generator belongs to the training step
            worker_init_fn=leave_signals_to_parent,
        )

    def __iter__(self) -> Iterator[StreamItem]:
        """Yield the items of this worker's batches."""
        worker = get_worker_info()
        first, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        lanes: dict[int, _Lane] = {}
        for step in itertools.count(self.start_step + first, count):
            lane, number = step % self.num_lanes, step // self.num_lanes
            start = number * self.batch_size
            if lane not in lanes:
                lanes[lane] = _Lane(self._samples(lane, start), start)
            batch = lanes[lane].take(start, self.batch_size)
            if not batch:
                return
            yield from self._items(batch)

    def _items(self, batch: "list[_Placed]") -> Iterator[StreamItem]:
        """Yield the decoded batch; in training, another sample replaces one that is damaged."""
        items = [self._item(placed) for placed in batch]
        good = [item for item in items if item is not None]
        if not good and self.train:
            raise DataError(
                f"{batch[0].url}: no picture of the batch that begins with {batch[0].sample.key} "
                "can be decoded; repair the shard"
            )
        for place, item in enumerate(items):
            if item is not None:
                yield item
            elif self.train:
                yield good[place % len(good)]

    def _item(self, placed: "_Placed") -> StreamItem | None:
        sample = placed.sample
        try:
            pixels_hw3 = self._squares.resize(decode_rgb(sample.content))
        except DataError as error:
            self._report(Problem(f"{placed.url}: {sample.key}", str(error)))
            return None
        number = int.from_bytes(hashlib.blake2b(sample.key.encode(), digest_size=8).digest())
        drawn = 0
        if self.train:
            count = len(sample.captions)
            drawn = drawn_caption(count, seed=self.seed, epoch=placed.epoch, number=number)
        image_3HW = self._squares.cut(pixels_hw3, epoch=placed.epoch, number=number)
        return {
            "image": torch.from_numpy(image_3HW),
            "caption": sample.captions[drawn] if sample.captions else "",
            "class_id": sample.class_id,
            "key": sample.key,
        }

    def _samples(self, lane: int, start: int) -> "Iterator[_Placed]":
        """Yield the samples of a lane, shuffled, from number `start` on."""
        empty = 0
        for epoch in itertools.count() if self.train else (0,):
            whole = start - start % self._block  # samples in blocks before the block of `start`
            samples = self._in_order(lane, epoch, whole)
            total = sum(1 for _ in itertools.islice(samples, whole))
            drop = start - whole
            for number in itertools.count(whole // self._block):
                block = list(itertools.islice(samples, self._block))
                if not block:
                    break
                for index in self._block_order(lane, epoch, number, len(block))[drop:]:
                    placed = block[index]
                    assert placed is not None  # only those before `whole` are
                    yield placed
                total += len(block)
                drop = 0
            start = max(0, start - total)
            empty = 0 if total else empty + 1
            if empty > MAX_EMPTY_EPOCHS:
                raise DataError(
                    f"{self.shards.urls[0]} and the other {len(self.shards.urls) - 1} shards have "
                    "no usable training sample; examine them with: nsp data stats"
                )

    def _in_order(self, lane: int, epoch: int, skip: int) -> "Iterator[_Placed | None]":
        """Yield the samples of a lane's epoch, unshuffled; None for each of the first `skip`."""
        for url in self._lane_urls(lane, epoch):
            length = self._lengths.get(url)
            if length is not None and length <= skip:
                yield from itertools.repeat(None, length)
                skip -= length
                continue
            number = 0
            for found in self._reader.read(url, skip=skip):
                if isinstance(found, Problem):
                    self._report(found)
                    continue
                number += 1
                yield _Placed(found, url, epoch) if number > skip else None
            if length not in (None, number) and not self.skip_bad_files:
                raise DataError(
                    f"{url}: {number} training samples, expected {length}; it has changed, or the "
                    "index.json next to it belongs to other shards; pack them again"
                )
            self._lengths[url] = number
            skip = max(0, skip - number)

    def _lane_urls(self, lane: int, epoch: int) -> list[str]:
        """Return the shards of a lane in one epoch, in order."""
        urls = self.shards.urls
        order: Iterable[int] = range(len(urls))
        if self.train:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(urls)).tolist()
        num_slots = self._world_size * self.num_lanes
        slot = lane * self._world_size + self._rank
        # Counted through all epochs, so that a remainder does not always go to the same lanes.
        first = (slot - epoch * len(urls)) % num_slots
        return [urls[index] for index in list(order)[first::num_slots]]

    def _block_order(self, lane: int, epoch: int, number: int, size: int) -> NDArray[np.int64]:
        if not self.train:
            return np.arange(size)
        slot = lane * self._world_size + self._rank
        # 1 gives another random stream than the order of shards
        return np.random.default_rng([self.seed, epoch, 1, slot, number]).permutation(size)

    def _report(self, problem: Problem) -> None:
        """Raise, or count it and warn once in this process."""
        if not self.skip_bad_files:
            raise DataError(
                f"{problem}; repair or remove it, or leave it out with --skip-bad-files"
            )
        worker = get_worker_info()
        self._left_out[0 if worker is None else worker.id % _MAX_WORKERS] += 1
        if problem.name not in self._warned:
            self._warned.add(problem.name)
            logger.warning("left out %s", problem)


@dataclass(frozen=True)
class _Placed:
    """A sample with its shard and its place in the order."""

    sample: RawSample
    url: str
    epoch: int


class _Lane:
    """The samples of one lane; each batch is taken once, in order."""

    def __init__(self, samples: Iterator[_Placed], position: int) -> None:
        self._samples, self._position = samples, position

    def take(self, start: int, count: int) -> list[_Placed]:
        """Return samples `start` .. `start` + `count` - 1, or fewer at the end."""
        passed_over = start - self._position
        self._position = start + count
        return list(itertools.islice(self._samples, passed_over, passed_over + count))


def _check_numbers(
    batch_size: int, rank: int, world_size: int, start_step: int, shuffle_buffer: int
) -> None:
    if batch_size < 1 or start_step < 0 or shuffle_buffer < 1 or not 0 <= rank < world_size:
        raise ConfigError(
            f"batch_size={batch_size}, start_step={start_step}, shuffle_buffer={shuffle_buffer}, "
            f"rank={rank}, world_size={world_size}: sizes are at least 1, start_step at least 0, "
            "and rank below world_size"
        )


def _choose_lanes(num_shards: int, world_size: int, wanted: int | None, train: bool) -> int:
    """Return the number of lanes of a rank; ConfigError if a lane would have no shard."""
    lanes = wanted or 1
    if wanted is None and train:
        while 2 * lanes <= min(MAX_LANES, num_shards // world_size):
            lanes *= 2
    if lanes < 1 or num_shards < world_size * lanes or (lanes > 1 and not train):
        raise ConfigError(
            f"{num_shards} shards for {world_size} ranks of {lanes} lanes: every lane needs one; "
            "pack more shards (nsp data pack --samples-per-shard), or ask for fewer lanes (without "
            "training, one)"
        )
    return lanes
