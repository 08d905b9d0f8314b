"""How sure a ratio of times is."""

from collections.abc import Sequence

import numpy as np


def median_ratio(base: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of medians, as tables show it, and its 95 % bootstrap interval over rounds.

    A round is drawn as a whole: what slowed everybody in it cancels.
    """
    before, after = np.asarray(base), np.asarray(times)
    count = min(len(before), len(after))
    picks = np.random.default_rng(0).integers(0, count, (2000, count))
    ratios = np.median(before[:count][picks], axis=1) / np.median(after[:count][picks], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = float(np.median(before) / np.median(after))
    return value, min(float(low), value), max(float(high), value)
