"""The crops that codes are extracted from: ADM's centre crop, then ten crops of it.

Source: center_crop_arr of github.com/openai/guided-diffusion, guided_diffusion/image_datasets.py,
and torchvision's TenCrop, as github.com/FoundationVision/LlamaGen uses both.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nsp.errors import ConfigError

Pixels = NDArray[np.uint8]
CROP_RANGES = (1.1, 1.05)  # of the public code's two sets
CLOSER = "_105"  # ending of the folder of closer crops, in which the public code has 1.05


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How codes are extracted, and this process's share of the pictures."""

    image_size_px: int
    ten_crop: bool = False
    crop_ranges: tuple[float, ...] = CROP_RANGES  # widths of the squares that ten crops are cut of
    flip: bool = False  # also the mirrored picture; ten crops have it anyway
    part: int = 0
    num_parts: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.part < self.num_parts:
            raise ConfigError(
                f"--shard {self.part}/{self.num_parts}: the first number is at least 0 and below "
                "the second"
            )
        if not 1 <= len(self.crop_ranges) <= 2:
            raise ConfigError(
                f"--crop-range {self.crop_ranges}: one or two numbers, as training mixes two sets"
            )
        if not all(1 <= each <= 4 for each in self.crop_ranges):
            raise ConfigError(f"--crop-range {self.crop_ranges}: each must be from 1 to 4")

    def sets(self, folder: Path) -> dict[Path, float]:
        """Return the folder of every set of crops and its range; the wider is `folder` itself.

        The other has the name by which training finds it, whatever its range is.
        """
        if not self.ten_crop:
            return {folder: 1.0}
        wide, *closer = sorted(set(self.crop_ranges), reverse=True)
        return {folder: wide, **{folder.with_name(folder.name + CLOSER): each for each in closer}}


def centre_crop(picture: Image.Image, side_px: int) -> Pixels:
    """Return the centre (side, side, 3): halved while possible, then resized by the short side."""
    while min(picture.size) >= 2 * side_px:
        halved = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halved, Image.Resampling.BOX)
    scale = side_px / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - side_px) // 2, (pixels.shape[1] - side_px) // 2
    return pixels[top : top + side_px, left : left + side_px]


def crops_of(
    picture: Image.Image, side_px: int, *, crop_range: float, ten_crop: bool, flip: bool
) -> Pixels:
    """Return the crops (count, 3, side, side) of a picture, always in the same order.

    Ten crops are the corners, from the top left by rows, and the centre of a square `crop_range`
    times as wide, and the same five of the mirrored picture; `flip` alone mirrors the centre crop.
    """
    if not ten_crop:
        square = centre_crop(picture, side_px)
        found = [square, square[:, ::-1]] if flip else [square]
    else:
        wide = centre_crop(picture, int(side_px * crop_range))
        found = [*_five(wide, side_px), *_five(wide[:, ::-1], side_px)]
    return np.stack(found).transpose(0, 3, 1, 2)


def centre_of(num_crops: int) -> int:
    """Return which of the crops of a file is the centre of the picture, not mirrored."""
    return 4 if num_crops == 10 else 0


def _five(pixels: Pixels, side: int) -> list[Pixels]:
    end = pixels.shape[0] - side
    middle = round(end / 2)
    places = ((0, 0), (0, end), (end, 0), (end, end), (middle, middle))
    return [pixels[top : top + side, left : left + side] for top, left in places]
