"""Notices a loss that went wrong, by the rule GuardConfig states."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

from nsp.family.recipe import GuardConfig


class LossGuard:
    """Judges the reported losses of one phase; its memory is saved with the phase."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._recent: deque[float] = deque(maxlen=config.window)

    @property
    def memory(self) -> list[float]:
        """The reported losses it compares with."""
        return list(self._recent)

    @memory.setter
    def memory(self, losses: Sequence[float]) -> None:
        self._recent = deque(losses, maxlen=self._config.window)

    def judge(self, loss: float, *, spikes: bool = True) -> str | None:
        """Return what is wrong with a reported loss, or None and remember it.

        Without `spikes` it compares with no other and must only be finite.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not spikes:
            return None
        ratio = self._config.spike_ratio
        if ratio and len(self._recent) >= self._config.window // 2:
            usual = statistics.median(self._recent)
            if loss > ratio * abs(usual):
                return f"the loss is {loss:.4g}, {ratio:g} times the usual {usual:.4g} and more"
        self._recent.append(loss)
        return None
