"""Ctrl-C and SIGTERM end a phase between two steps, on all processes at the same one."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)


class StopRequest:
    """Context in which SIGINT and SIGTERM are noted instead of interrupting a step.

    A second signal interrupts at once, as Python does. A half-done step must not be saved: some of
    its weights would already be those of the next step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator, self._noted = accelerator, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Handle the signals here; Python allows this only in the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the previous handling of the signals."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True
        logger.info("stopping after this step; press Ctrl-C again to stop at once")

    def agreed(self) -> bool:
        """Return whether any process was asked to stop; all of them must call this together."""
        if self._accelerator.num_processes == 1:
            return self._noted
        asked = torch.tensor(float(self._noted), device=self._accelerator.device)
        total: torch.Tensor = self._accelerator.reduce(asked, reduction="sum")
        return bool(total.item())
