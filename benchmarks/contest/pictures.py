"""The pictures both sides make of the same prompts, and how they differ: for the report."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.benchmarks.contest.parity import psnr_db
from nsp.benchmarks.contest.subject import Subject

NUM_PICTURES = 6
_GAIN = 16  # of a difference as it is shown: rounding to 8 bits alone is invisible


@dataclass(frozen=True)
class Pictures:
    """One picture per prompt from each side, (N, H, W, 3) uint8."""

    baseline: str
    contender: str
    captions: tuple[str, ...]
    expected: NDArray[np.uint8]
    found: NDArray[np.uint8]

    @property
    def difference(self) -> NDArray[np.uint8]:
        """Absolute difference, amplified for the eye."""
        apart = np.abs(self.expected.astype(np.int16) - self.found)
        shown: NDArray[np.uint8] = np.minimum(apart * _GAIN, 255).astype(np.uint8)
        return shown

    @property
    def gain(self) -> int:
        """How much the difference is amplified."""
        return _GAIN

    def largest_error(self, index: int) -> int:
        """Return the largest difference of a pair, in 8-bit steps."""
        apart = self.expected[index].astype(np.int16) - self.found[index]
        return int(np.abs(apart).max())

    def psnr_db(self, index: int) -> float | None:
        """Return the PSNR of a pair, None when equal."""
        a, b = (pixels[index].astype(np.float32) / 255 for pixels in (self.expected, self.found))
        return psnr_db(a, b)


def make_pictures(subject: Subject, *, seed: int) -> Pictures | None:
    """Return the pictures of both sides, each free-running; None without a baseline."""
    if subject.baseline is None:
        return None
    limit = subject.contender.pipeline.max_batch or NUM_PICTURES
    count = min(NUM_PICTURES, limit)
    sampling = subject.contender.pipeline.sampling.to_dict()
    request: dict[str, Any] = {**subject.request(count, seed), **sampling}
    expected, found = (
        side.pipeline.generate(**request).images for side in (subject.baseline, subject.contender)
    )
    return Pictures(
        baseline=subject.baseline.name,
        contender=subject.contender.name,
        captions=subject.titles(count, seed),
        expected=expected,
        found=found,
    )
