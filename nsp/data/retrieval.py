"""Is the nearest real picture the one the prompt names? Ranks, recall and its confidence."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nsp.config import Config
from nsp.data.sources import ImageSource

SIDE_PX = 64
_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class PictureSet:
    """The distinct pictures of a source, and which of them each name and caption stands for."""

    pixels: NDArray[np.float32]  # (M, SIDE_PX * SIDE_PX * 3), in [0, 255]
    number_of: dict[str, int]  # sample name -> row of `pixels`

    @classmethod
    def of(cls, source: ImageSource) -> "PictureSet":
        """Return the set of a source; samples with identical pictures share a row."""
        named = enumerate(source.samples)
        return cls.of_pictures((each.name, np.asarray(source.load(i))) for i, each in named)

    @classmethod
    def of_pictures(cls, named: Iterable[tuple[str, NDArray[np.uint8]]]) -> "PictureSet":
        """Return the set of pictures (H, W, 3) with their names; identical ones share a row."""
        rows: dict[bytes, int] = {}
        number_of = {}
        for name, picture in named:
            number_of[name] = rows.setdefault(at_side(picture).tobytes(), len(rows))
        flat = [np.frombuffer(content, np.uint8) for content in rows]
        return cls(np.stack(flat).astype(np.float32), number_of)

    def ranks(self, images: Sequence[NDArray[np.uint8]], names: Sequence[str]) -> NDArray[np.int64]:
        """Return for each image how many distinct pictures are nearer to it than the named one.

        Distance is the mean squared difference of pixels at 64 px. 0: the named one is nearest.
        """
        return self.ranks_of_any(images, [(name,) for name in names])

    def ranks_of_any(
        self, images: Sequence[NDArray[np.uint8]], names: Sequence[Sequence[str]]
    ) -> NDArray[np.int64]:
        """Return the ranks as above, where each image has several names: that of the nearest."""
        found = np.stack([at_side(image).ravel() for image in images]).astype(np.float32)
        norms = np.einsum("md,md->m", self.pixels, self.pixels, dtype=np.float64)
        distances = norms - 2.0 * (found @ self.pixels.T)  # of |a - b|^2, less |a|^2
        wanted = [[self.number_of[name] for name in own] for own in names]
        own = np.array([row[rows].min() for row, rows in zip(distances, wanted, strict=True)])
        ranks: NDArray[np.int64] = (distances < own[:, None]).sum(1)
        return ranks

    def picture(self, name: str) -> NDArray[np.uint8]:
        """Return the picture (64, 64, 3) a name stands for."""
        row = self.pixels[self.number_of[name]].reshape(SIDE_PX, SIDE_PX, 3)
        picture: NDArray[np.uint8] = row.astype(np.uint8)
        return picture


def at_side(image: NDArray[np.uint8], side_px: int = SIDE_PX) -> NDArray[np.uint8]:
    """Return the picture at another size, 64 px unless told."""
    size = (side_px, side_px)
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


@dataclass(frozen=True, kw_only=True)
class Recall(Config):
    """A share of captions, with its 95 % interval (Wilson 1927)."""

    count: int
    share: float
    low: float
    high: float

    @classmethod
    def at(cls, ranks: NDArray[np.int64], k: int) -> "Recall":
        """Return how many of the named pictures are among the `k` nearest."""
        count, hits = len(ranks), int((ranks < k).sum())
        share, square = hits / count, _Z**2 / count
        centre = (share + square / 2) / (1 + square)
        half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
        low, high = max(0.0, centre - half), min(1.0, centre + half)
        return cls(count=count, share=share, low=low, high=high)

    def __str__(self) -> str:
        """Show the share and its interval in percent."""
        return f"{100 * self.share:.1f} % ({100 * self.low:.0f} to {100 * self.high:.0f})"


def psnr_db(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio of two pictures, at most 100: that of equal ones."""
    mse = float(np.square(a.astype(np.float64) - b).mean())
    return 10 * math.log10(255**2 / max(mse, 255**2 * 1e-10))
