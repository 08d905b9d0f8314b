"""Detects a loss that went wrong, by the rule in GuardConfig."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

from nsp.family.recipe import GuardConfig


class LossGuard:
    """Checks the reported losses of one phase; its memory is saved with the phase."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._recent: deque[float] = deque(maxlen=config.window)

    @property
    def memory(self) -> list[float]:
        """The earlier losses that it compares with."""
        return list(self._recent)

    @memory.setter
    def memory(self, losses: Sequence[float]) -> None:
        self._recent = deque(losses, maxlen=self._config.window)

    def judge(self, loss: float, *, spikes: bool = True) -> str | None:
        """Return what is wrong with a reported loss; if nothing is, remember it and return None.

        Without `spikes` the loss must only be finite.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not spikes:
            return None
        ratio = self._config.spike_ratio
        if ratio and len(self._recent) >= self._config.window // 2:
            usual = statistics.median(self._recent)
            if loss > ratio * abs(usual):
                return f"the loss is {loss:.4g}, more than {ratio:g} times the usual {usual:.4g}"
        self._recent.append(loss)
        return None
