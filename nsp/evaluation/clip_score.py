"""CLIP score: how well pictures fit their captions, by a CLIP that the user has as a folder.

The score of a picture is 100 max(cos, 0) of its embedding and its caption's, and that of a set is
the mean. Hessel et al. 2021, arXiv:2104.08718, equation 1, have w = 2.5 in place of 100;
torchmetrics has 100, and bounds the mean by 0 instead of each picture.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from nsp.errors import DataError
from nsp.evaluation.captioned_pictures import Captioned
from nsp.evaluation.clip import Clip


@dataclass(frozen=True, kw_only=True)
class ClipScore:
    """The score of a set of pictures."""

    clip_score: float  # 0 to 100
    num_pictures: int
    definition: str = "mean of 100 max(cos, 0)"


def clip_score(
    pictures: Captioned,
    clip: Clip,
    *,
    batch_size: int = 32,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ClipScore:
    """Return the mean of 100 max(cos, 0) over all pictures; DataError if one is not finite."""
    scores: list[float] = []
    batch: list[tuple[Image.Image, str]] = []
    for each in pictures:
        batch.append(each)
        if len(batch) < batch_size and len(scores) + len(batch) < len(pictures):
            continue
        images, captions = zip(*batch, strict=True)
        scores += (100 * clip.cosines(images, captions).clamp_min(0)).tolist()
        batch = []
        if on_progress is not None:
            on_progress("pictures", len(scores), len(pictures))
    mean = math.fsum(scores) / len(scores)
    if not math.isfinite(mean):
        raise DataError("the CLIP's embedding of a picture or a caption is not finite")
    return ClipScore(clip_score=mean, num_pictures=len(scores))
