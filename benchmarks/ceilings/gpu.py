"""What a GPU can do at most, measured in the run that is held against it; and a clock for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nsp.config import Config

# An estimate of how few fused kernels a block can be; none was seen with fewer.
KERNELS_PER_LAYER = 7
_LAUNCHES = 1000


@dataclass(frozen=True, kw_only=True)
class GpuCeilings(Config):
    """Rates of products in one dtype, of copies, and what a kernel costs at least."""

    device: str
    dtype: str
    gemm_side: int
    gemm_gflops: tuple[float, ...]  # of each repeat
    copy_mib: int
    copy_gb_s: tuple[float, ...]  # read plus written
    launch_us: float  # of a kernel that does nothing, launched by PyTorch
    graph_kernel_us: float | None  # the same inside a CUDA graph; None: there are none here

    @property
    def gemm_peak_gflops(self) -> float:
        """Best rate of a product."""
        return max(self.gemm_gflops)

    @property
    def bandwidth_gb_s(self) -> float:
        """Best rate of a copy."""
        return max(self.copy_gb_s)

    def launch_ms(self, layers: int, scales: int) -> float:
        """Return what launching the kernels of all scale steps costs in the cheapest way here."""
        each = self.launch_us if self.graph_kernel_us is None else self.graph_kernel_us
        return 1e-3 * each * KERNELS_PER_LAYER * layers * scales


class Clock:
    """Times work in ms: by CUDA events on a GPU, else by the wall."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.name = "CUDA events" if self.on_gpu else "wall"

    def ms(self, work: Callable[[], Any]) -> float:
        """Return how long the work takes, all of it: the device is idle before and after.

        A runtime may return with its work still running on a stream of its own, which torch's
        events do not wait for: so the device is waited for before the second event.
        """
        if not self.on_gpu:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        work()
        torch.cuda.synchronize()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))


def measure_gpu_ceilings(device: str, precision: str, *, quick: bool) -> GpuCeilings:
    """Return the ceilings of a device in a precision; a second on a GPU."""
    clock = Clock(device)
    side, copy_mib = (8192, 1024) if clock.on_gpu else (256, 16)
    repeats = 5 if quick else 20
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(copy_mib << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    gemm_ms = _times(clock, lambda: torch.matmul(a, b, out=product), repeats)
    copy_ms = _times(clock, lambda: target.copy_(source), repeats)
    return GpuCeilings(
        device=torch.cuda.get_device_name() if clock.on_gpu else "CPU",
        dtype=str(dtype).removeprefix("torch."),
        gemm_side=side,
        gemm_gflops=tuple(2e-6 * side**3 / ms for ms in gemm_ms),
        copy_mib=copy_mib,
        copy_gb_s=tuple(2e-6 * source.nbytes / ms for ms in copy_ms),
        launch_us=min(_times(clock, lambda: _launches(device), 3)) * 1e3 / _LAUNCHES,
        graph_kernel_us=_graph_kernel_us(clock, device) if clock.on_gpu else None,
    )


def _times(clock: Clock, work: Callable[[], Any], repeats: int) -> list[float]:
    """Return the ms of each repeat, after one that is not counted."""
    work()
    return [clock.ms(work) for _ in range(repeats)]


def _launches(device: str) -> None:
    """Launch many kernels of which each waits for the one before."""
    value = torch.zeros(1, device=device)
    for _ in range(_LAUNCHES):
        value.add_(1)


def _graph_kernel_us(clock: Clock, device: str) -> float:
    """Return what a kernel costs inside a CUDA graph."""
    value, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    value.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            value.add_(1)
    return min(_times(clock, graph.replay, 3)) * 1e3 / _LAUNCHES
