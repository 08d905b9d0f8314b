"""What a GPU can do at most: products in one dtype, copies, and the cost of a kernel."""

from typing import Any

import torch

from nsp.artifacts.manifest import PRECISION_DTYPES
from nsp.benchmarks.ceilings.clock import Clock
from nsp.benchmarks.ceilings.product import product_gflop
from nsp.benchmarks.ceilings.rates import Ceilings

_LAUNCHES = 1000


def measure_gpu_ceilings(
    device: str, precision: str, *, repeats: int, side: int = 8192, copy_mib: int = 1024
) -> Ceilings:
    """Return the ceilings of a device in a precision; a second on a GPU."""
    clock = Clock(device)
    dtype: torch.dtype = getattr(torch, PRECISION_DTYPES[precision])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(copy_mib << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    gemm_ms = clock.least_ms(lambda: torch.matmul(a, b, out=product), repeats)
    copy_ms = clock.least_ms(lambda: target.copy_(source), repeats)
    return Ceilings(
        device=torch.cuda.get_device_name() if clock.on_gpu else "CPU",
        dtype=PRECISION_DTYPES[precision],
        threads=1,
        gemm_side=side,
        gemm_gflops={"torch": (1e3 * product_gflop(side) / gemm_ms,)},
        copy_gb_s=(2e-6 * source.nbytes / copy_ms,),
        launch_us=clock.least_ms(lambda: _launches(device), 3) * 1e3 / _LAUNCHES,
        graph_kernel_us=_graph_kernel_us(clock, device) if clock.on_gpu else None,
    )


def _launches(device: str) -> None:
    """Launch many kernels of which each waits for the one before."""
    value = torch.zeros(1, device=device)
    for _ in range(_LAUNCHES):
        value.add_(1)


def _graph_kernel_us(clock: Clock, device: str) -> float:
    """Return what a kernel costs inside a CUDA graph."""
    value: Any = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    value.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            value.add_(1)
    return clock.least_ms(graph.replay, 3) * 1e3 / _LAUNCHES
