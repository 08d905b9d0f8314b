"""The most a machine was seen to do, in the run that is held against it."""

from dataclasses import dataclass
from typing import Self

from nsp.config import Config

# An estimate of how few fused kernels a layer can be; none was seen with fewer.
KERNELS_PER_LAYER = 7


@dataclass(frozen=True, kw_only=True)
class Ceilings(Config):
    """Rates of products and copies, of a processor with its threads or of a GPU."""

    device: str = "cpu"
    dtype: str = "float32"  # of the products
    threads: int
    gemm_side: int  # of the square matrices
    gemm_gflops: dict[str, tuple[float, ...]]  # library -> best of each measurement
    copy_gb_s: tuple[float, ...]  # read plus written, best of each measurement
    launch_us: float | None = None  # of a kernel that does nothing; None on a processor
    graph_kernel_us: float | None = None  # the same inside a CUDA graph

    @property
    def gemm_peak_gflops(self) -> float:
        """Best rate of any library: the ceiling of compute."""
        return max(max(rates) for rates in self.gemm_gflops.values())

    @property
    def bandwidth_gb_s(self) -> float:
        """Best rate of a copy: the ceiling of memory traffic."""
        return max(self.copy_gb_s)

    @property
    def drift(self) -> float:
        """Largest change between measurements of one library, as a fraction of the larger."""
        rates = [*self.gemm_gflops.values(), self.copy_gb_s]
        return max(1 - min(each) / max(each) for each in rates)

    def launch_ms(self, layers: int) -> float:
        """Return what launching the kernels of so many layers costs in the cheapest way here."""
        each = self.launch_us if self.graph_kernel_us is None else self.graph_kernel_us
        return 1e-3 * (each or 0.0) * KERNELS_PER_LAYER * layers

    def joined(self, other: Self) -> "Ceilings":
        """Return both measurements as one, in order."""
        gemm = {
            name: self.gemm_gflops.get(name, ()) + other.gemm_gflops.get(name, ())
            for name in self.gemm_gflops | other.gemm_gflops
        }
        return Ceilings(
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            gemm_side=self.gemm_side,
            gemm_gflops=gemm,
            copy_gb_s=self.copy_gb_s + other.copy_gb_s,
            launch_us=self.launch_us,
            graph_kernel_us=self.graph_kernel_us,
        )
