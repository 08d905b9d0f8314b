"""The options of an export, and its progress reports."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from nsp.artifacts.manifest import PRECISION_DTYPES
from nsp.config import Config
from nsp.cores import num_threads
from nsp.errors import ConfigError
from nsp.values import count

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Config):
    """One export."""

    checkpoint: str  # folder
    engine_dir: str = "engines"
    precisions: tuple[str, ...] = ("fp32",)
    targets: tuple[str, ...] = (AUTO,)  # names in `nsp.export.targets.TARGETS`, or "auto"
    max_batch: int = 4  # images per batch of TensorRT engines; ONNX Runtime has no limit
    static_batch: bool = False  # TensorRT engines of one batch size, for guided images
    gpu_archs: tuple[str, ...] = ()  # for TensorRT-RTX engines; () is the target's default
    rebuild: bool = False  # build everything again
    build_timeout_s: float = 3600.0  # per engine
    verify: bool = True  # check the checkpoint's digests
    num_threads: int | None = None  # for ONNX Runtime's checks; None: see `nsp.cores`

    def __post_init__(self) -> None:
        """Check everything that does not need the checkpoint."""
        for name in self.precisions:
            if name not in PRECISION_DTYPES:
                known = ", ".join(PRECISION_DTYPES)
                raise ConfigError(f"precision {name!r} is not one of {known}")
        if not self.precisions or not self.targets:
            raise ConfigError("an export needs at least one precision and one target")
        count("max_batch", self.max_batch)
        if self.num_threads is not None:
            num_threads(self.num_threads)
        if not 0 < self.build_timeout_s <= threading.TIMEOUT_MAX:
            raise ConfigError(
                f"build_timeout_s={self.build_timeout_s} must be above 0 and at most "
                f"{threading.TIMEOUT_MAX:g}"
            )


@dataclass(frozen=True, kw_only=True)
class ExportEvent:
    """Progress of an export; `fraction` is that of the whole export, 0 to 1."""

    stage: str
    target: str
    precision: str
    phase: str  # "reference", "onnx", "lint", "parity", "build", "reuse", "check" or "done"
    fraction: float
    message: str


OnEvent: TypeAlias = Callable[[ExportEvent], None]
