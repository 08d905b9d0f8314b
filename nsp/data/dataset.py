"""Serves the pictures of an ImageSource to training as uint8 tensors, the same on every resume."""

from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from nsp.data.sources import ImageSource
from nsp.errors import ConfigError

CACHE_BYTES = 1 << 30  # of decoded pictures, over all workers of this process
CROP_MARGIN = 1.125  # short side before a crop, in picture sides (the VAR training recipe)


class ImageItem(TypedDict):
    """One picture as training sees it."""

    image: Tensor  # uint8 (3, H, W)
    caption: str
    class_id: int  # -1: the source has no classes
    index: int


class ImageDataset(Dataset[ImageItem]):
    """The pictures of a source as ImageItems of one size: H = W = image_size_px.

    With `crop`, the short side is resized to 1.125 x that and a square is cut out: at random when
    `train`, else the centre one. Without `crop`, a picture of exactly that size is used untouched;
    any other has its short side resized to it and its centre cut out. `flip` mirrors half of the
    pictures when `train`; leave it off where captions name a side.

    What is random depends on (seed, epoch, index) alone: neither on the order of reading nor on the
    number of workers. Call `set_epoch` before iterating.
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
        """Keep the choices; nothing is read yet. Raises ConfigError for a bad size or seed."""
        if image_size_px < 1 or seed < 0:
            raise ConfigError(
                f"image_size_px {image_size_px} and seed {seed}: need at least 1 px and a seed >= 0"
            )
        self.source = source
        self.image_size_px = image_size_px
        self.train = train
        self.crop = crop
        self.flip = flip
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # persistent workers see it
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cache_bytes_left = cache_bytes

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose crops and flips come next, in this process and its workers."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.source)

    def __getitem__(self, index: int) -> ImageItem:
        """Return one item; a negative or too large index raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        sample = self.source.samples[index]
        square_HW3 = self._cut(self._resized(index), index)
        image_3HW = torch.from_numpy(square_HW3.transpose(2, 0, 1).copy())
        class_id = -1 if sample.class_id is None else sample.class_id
        return {"image": image_3HW, "caption": sample.caption, "class_id": class_id, "index": index}

    def _resized(self, index: int) -> NDArray[np.uint8]:
        """Return the picture with its short side at the size to cut from, uint8 (h, w, 3)."""
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        short_px = round(self.image_size_px * CROP_MARGIN) if self.crop else self.image_size_px
        pixels = np.asarray(_resize_short_side(self.source.load(index), short_px))
        worker = get_worker_info()
        num_copies = 1 if worker is None else worker.num_workers  # each worker fills its own cache
        if pixels.nbytes * num_copies <= self._cache_bytes_left:
            self._cache_bytes_left -= pixels.nbytes * num_copies
            self._cache[index] = pixels
        return pixels

    def _cut(self, pixels_hw3: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        side = self.image_size_px
        spare_h, spare_w = pixels_hw3.shape[0] - side, pixels_hw3.shape[1] - side
        top, left, mirrored = spare_h // 2, spare_w // 2, False
        if self.train:
            # A counter of its own for each index: streams cannot overlap.
            philox = np.random.Philox(
                key=np.array([self.seed, int(self._epoch)], dtype=np.uint64),
                counter=np.array([0, 0, 0, index], dtype=np.uint64),
            )
            generator = np.random.Generator(philox)
            if self.crop:
                top = int(generator.integers(spare_h, endpoint=True))
                left = int(generator.integers(spare_w, endpoint=True))
            mirrored = self.flip and bool(generator.integers(2))
        square = pixels_hw3[top : top + side, left : left + side]
        return square[:, ::-1] if mirrored else square


def _resize_short_side(picture: Image.Image, short_px: int) -> Image.Image:
    width, height = picture.size
    if min(width, height) == short_px:
        return picture
    ratio = short_px / min(width, height)
    size = (max(short_px, round(width * ratio)), max(short_px, round(height * ratio)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def to_model_range(image_BCHW: Tensor) -> Tensor:
    """Return uint8 pixels (any shape) as float32 in [-1, 1]: 0 becomes -1, 255 becomes 1."""
    return image_BCHW.float() / 127.5 - 1.0
