"""Serves the pictures of an ImageSource to training as uint8 tensors, the same on every resume."""

from collections.abc import Iterable, Iterator
from typing import TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from nsp.data.crops import Crop
from nsp.data.samples import drawn_caption
from nsp.data.sources import ImageSource
from nsp.errors import DataError

T = TypeVar("T")
CACHE_BYTES = 1 << 30  # for decoded pictures, over all workers of this process


class ImageItem(TypedDict):
    """One picture as training sees it."""

    image: Tensor  # uint8 (3, H, W)
    caption: str  # "" means that the source has no captions
    class_id: int  # -1 means that the source has no classes
    index: int


class ImageDataset(Dataset[ImageItem]):
    """The pictures of a source as ImageItems, cut as `Crop` says: H = W = image_size_px.

    If a picture has several captions, every epoch draws one of them.
    Random choices depend on (seed, epoch, index) alone, not on the order of reading or the number
    of workers. Call `set_epoch` before iterating.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size_px: int,
        *,
        train: bool,
        crop: bool,
        flip: bool = False,
        seed: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Store the settings; nothing is read yet. Raises ConfigError for a bad size or seed."""
        self.source = source
        self.image_size_px = image_size_px
        self.train = train
        self.crop = crop
        self.flip = flip
        self.seed = seed
        self._squares = Crop(
            image_size_px=image_size_px, train=train, crop=crop, flip=flip, seed=seed
        )
        self._first_rows = np.cumsum([0, *(len(each.captions) for each in source.samples)])
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # persistent workers see it
        self._own_epoch: int | None = None
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cache_bytes_left = cache_bytes

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose crops, flips and captions come next, in all processes."""
        if get_worker_info() is None:
            self._epoch.fill_(epoch)
        else:  # another worker may be an epoch ahead: it must not change this worker's epoch
            self._own_epoch = epoch

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.source)

    def __getitem__(self, index: int) -> ImageItem:
        """Return one item; a negative or too large index raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        sample = self.source.samples[index]
        drawn = self.drawn(index)
        pixels_hw3 = self._resized(index)
        square_3HW = self._squares.cut(pixels_hw3, epoch=self._epoch_now(), number=index)
        class_id = -1 if sample.class_id is None else sample.class_id
        return {
            "image": torch.from_numpy(square_3HW),
            "caption": sample.captions[drawn] if sample.captions else "",
            "class_id": class_id,
            "index": index,
        }

    def captions(self) -> list[str]:
        """Return every caption of every picture, in order; `caption_row` gives their indices."""
        return [caption for sample in self.source.samples for caption in sample.captions]

    def caption_row(self, index: int) -> int:
        """Return the index into `captions` of picture `index` in this epoch."""
        return int(self._first_rows[index]) + self.drawn(index)

    def drawn(self, index: int) -> int:
        """Return which caption sample `index` has in this epoch; the first unless training."""
        if not self.train:
            return 0
        count = len(self.source.samples[index].captions)
        return drawn_caption(count, seed=self.seed, epoch=self._epoch_now(), number=index)

    def _epoch_now(self) -> int:
        return int(self._epoch) if self._own_epoch is None else self._own_epoch

    def _resized(self, index: int) -> NDArray[np.uint8]:
        """Return the picture with its short side at the size to cut from, uint8 (h, w, 3)."""
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        pixels = self._squares.resize(self.source.load(index))
        worker = get_worker_info()
        num_copies = 1 if worker is None else worker.num_workers  # each worker fills its own cache
        if pixels.nbytes * num_copies <= self._cache_bytes_left:
            self._cache_bytes_left -= pixels.nbytes * num_copies
            self._cache[index] = pixels
        return pixels


def to_model_range(image_BCHW: Tensor) -> Tensor:
    """Return uint8 pixels (any shape) as float32 in [-1, 1]: 0 becomes -1, 255 becomes 1."""
    return image_BCHW.float() / 127.5 - 1.0


def batches(loader: Iterable[T]) -> Iterator[T]:
    """Yield what a DataLoader yields; a DataError of a worker keeps its one-line message."""
    try:
        yield from loader
    except DataError as error:  # torch replaces its message by the worker's traceback
        raise DataError(str(error.args[0]).strip().rpartition("DataError: ")[2]) from error
