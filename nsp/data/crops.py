"""Cuts a square of one size from a picture; random choices depend on (seed, epoch, number) alone.

Axes: h w of the resized picture, H = W of the square.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nsp.errors import ConfigError

CROP_MARGIN = 1.125  # short side before a crop, in picture sides (the VAR training recipe)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """How squares are cut: H = W = `image_size_px`.

    With `crop`, the short side is resized to 1.125 times that size and a square is cut out: a
    random one when `train`, otherwise the centre. Without `crop`, a picture of exactly that size is
    used unchanged; for others, the short side is resized to it and the centre is cut out. `flip`
    mirrors half of the pictures when `train`; do not use it if captions mention left or right.
    """

    image_size_px: int
    train: bool
    crop: bool
    flip: bool
    seed: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.image_size_px < 1 or self.seed < 0:
            raise ConfigError(
                f"image_size_px {self.image_size_px} and seed {self.seed}: "
                "need at least 1 px and a seed >= 0"
            )

    def resize(self, picture: Image.Image) -> NDArray[np.uint8]:
        """Return the picture with its short side at the size to cut from, (h, w, 3)."""
        short_px = round(self.image_size_px * CROP_MARGIN) if self.crop else self.image_size_px
        return np.asarray(_resize_short_side(picture, short_px))

    def cut(self, pixels_hw3: NDArray[np.uint8], *, epoch: int, number: int) -> NDArray[np.uint8]:
        """Return the square (3, H, W) of picture `number`, from (seed, epoch, number) alone."""
        side = self.image_size_px
        spare_h, spare_w = pixels_hw3.shape[0] - side, pixels_hw3.shape[1] - side
        top, left, mirrored = spare_h // 2, spare_w // 2, False
        if self.train:
            # Each picture has its own counter, so that random streams cannot overlap.
            philox = np.random.Philox(
                key=np.array([self.seed, epoch], dtype=np.uint64),
                counter=np.array([0, 0, 0, number], dtype=np.uint64),
            )
            generator = np.random.Generator(philox)
            if self.crop:
                top = int(generator.integers(spare_h, endpoint=True))
                left = int(generator.integers(spare_w, endpoint=True))
            mirrored = self.flip and bool(generator.integers(2))
        square = pixels_hw3[top : top + side, left : left + side]
        square = square[:, ::-1] if mirrored else square
        return square.transpose(2, 0, 1).copy()


def _resize_short_side(picture: Image.Image, short_px: int) -> Image.Image:
    width, height = picture.size
    if min(width, height) == short_px:
        return picture
    ratio = short_px / min(width, height)
    size = (max(short_px, round(width * ratio)), max(short_px, round(height * ratio)))
    return picture.resize(size, Image.Resampling.LANCZOS)
