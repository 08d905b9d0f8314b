"""One clock for every device: the device is idle before and after what it times."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any


def torch_uses_gpu() -> bool:
    """Return whether there is a PyTorch that uses the GPU; engines need none."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


class Clock:
    """Times work in ms: by CUDA events on a GPU that torch uses, else by the wall."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda") and torch_uses_gpu()
        self.name = "CUDA events" if self.on_gpu else "wall"

    def ms(self, work: Callable[[], Any]) -> float:
        """Return how long the work takes, all of it.

        A runtime may return with its work still running on a stream of its own, which torch's
        events do not wait for: so the device is waited for before the second event.
        """
        if not self.on_gpu:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        import torch

        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        work()
        torch.cuda.synchronize()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def least_ms(self, work: Callable[[], Any], repeats: int) -> float:
        """Return the shortest of several runs, after one that is not counted."""
        work()
        return min(self.ms(work) for _ in range(repeats))
