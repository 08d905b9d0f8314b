"""What one fresh process measured of itself."""

from dataclasses import dataclass

from nsp.config import Config


@dataclass(frozen=True, kw_only=True)
class ColdRun(Config):
    """One fresh process. Moments are ms since its creation; files may be in the page cache.

    Memory is resident memory in MiB, shared libraries included.
    """

    contender: str
    batch: int
    python_ms: float  # the interpreter runs
    imported_ms: float  # nsp.pipeline is imported, its backend's library not yet
    loaded_ms: float  # the pipeline is loaded
    first_step_ms: float  # the first scale step is done
    image_ms: float  # the images are decoded
    stage_ms: dict[str, float]  # the first call of every stage, waiting for its session included
    stage_mib: dict[str, float]  # resident memory right after it
    imported_mib: float  # the process's own: interpreter, nsp, the backend's library
    loaded_mib: float
    peak_mib: float
    torch_imported: bool
    gpu_peak_mib: float | None = None  # of the whole process, its CUDA context included

    def stage_growth_mib(self, stage: str) -> float:
        """Return by how much memory grew from the end of the stage before to that of `stage`."""
        names = list(self.stage_mib)
        index = names.index(stage)
        before = self.stage_mib[names[index - 1]] if index else self.loaded_mib
        return self.stage_mib[stage] - before

    @property
    def first_call_ms(self) -> float:
        """Time of the first generate call, from loaded to image."""
        return self.image_ms - self.loaded_ms
