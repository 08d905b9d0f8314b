"""What a processor can do at most with a number of threads: products and copies in float32.

They are measured in a child, because NumPy's number of threads is fixed when NumPy is imported.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from nsp.benchmarks.ceilings.clock import Clock
from nsp.benchmarks.ceilings.product import onnxruntime_product, product_gflop
from nsp.benchmarks.ceilings.rates import Ceilings
from nsp.benchmarks.contest.processes import ask_once

COPY_BYTES = 64 << 20  # beyond the last-level cache of most machines
_REPEATS = 6


def measure_ceilings(*, threads: int, gemm_side: int) -> Ceilings:
    """Return the ceilings, from a process of its own; BackendError when it fails."""
    job = {"threads": threads, "gemm_side": gemm_side}
    return Ceilings.from_dict(ask_once(f"{__name__}:answers", job, threads=threads))


def answers(jobs: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the ceilings of this process: the program of `measure_ceilings`."""
    for job in jobs:
        found = ceilings_here(threads=job["threads"], gemm_side=job["gemm_side"])
        yield found.to_dict()


def ceilings_here(*, threads: int, gemm_side: int) -> Ceilings:
    """Return the ceilings of this process."""
    rng, clock = np.random.default_rng(0), Clock("cpu")
    a, b = (rng.standard_normal((gemm_side, gemm_side), np.float32) for _ in range(2))
    out = np.empty_like(a)
    products: dict[str, Callable[[], Any]] = {"numpy": lambda: np.matmul(a, b, out=out)}
    if (product := onnxruntime_product(a, b, threads=threads)) is not None:
        products["onnxruntime"] = product
    source = np.ones(COPY_BYTES // 4, np.float32)
    target = np.empty_like(source)
    copy_ms = clock.least_ms(lambda: np.copyto(target, source), _REPEATS)
    return Ceilings(
        threads=threads,
        gemm_side=gemm_side,
        gemm_gflops={
            name: (1e3 * product_gflop(gemm_side) / clock.least_ms(product, _REPEATS),)
            for name, product in products.items()
        },
        copy_gb_s=(2e-6 * source.nbytes / copy_ms,),
    )
