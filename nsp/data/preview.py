"""A few sample pictures of a data set or a stream."""

from itertools import islice
from typing import Any

import numpy as np

from nsp.data.dataset import ImageDataset
from nsp.data.stream import ShardStream


def preview(data: ImageDataset | ShardStream, count: int, *, seed: int) -> list[Any]:
    """Return up to `count` items: random ones chosen by `seed`, or the first of a stream."""
    if isinstance(data, ShardStream):
        return list(islice(iter(data.in_order()), count))
    rng = np.random.default_rng(seed)
    picks = rng.choice(len(data), size=min(count, len(data)), replace=False)
    return [data[int(index)] for index in picks]
