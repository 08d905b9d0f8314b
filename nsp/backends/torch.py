"""The `torch` backend: runs a checkpoint's own modules and so defines what is correct."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nsp.errors import BackendError, ConfigError
from nsp.stage.backend import Backend
from nsp.stage.io import Shape, StageIO
from nsp.values import shown


class TorchBackend(Backend):
    """Runs the stage modules eagerly."""

    name: ClassVar[str] = "torch"

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        stages_io: Mapping[str, StageIO],
        *,
        kv_layout: str = "delta",
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(stages_io)
        self.kv_layout = kv_layout
        self.device = usable_device(device)
        self._stages = {name: _placed(stage, self.device) for name, stage in stages.items()}

    @torch.inference_mode()
    def run(
        self, stage: str, feeds: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return all outputs; modules allocate them, and named ones are copied into `outputs`."""
        io = self.stages_io[stage]
        io.check(feeds, stage)
        try:
            results = self._stages[stage](*(feeds[name] for name in io.inputs))
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"torch: out of memory in stage {stage}; use a smaller --batch-size"
            ) from error
        named = dict(zip(io.outputs, results, strict=True))
        for name, target in (outputs or {}).items():
            target.copy_(named[name])
            named[name] = target
        return named

    def upload(self, array: NDArray[Any]) -> Tensor:
        """Return a tensor on the device."""
        return torch.from_numpy(np.array(array)).to(self.device)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy in host memory; bfloat16 becomes float32."""
        tensor: Tensor = array.detach().cpu()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        return tensor.numpy().copy()

    def allocate(self, shape: Shape, dtype: str) -> Tensor:
        """Return an uninitialised tensor."""
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def copy_rows(self, source: Any, target: Any) -> None:
        """Fill `target` (P, N, ...) with the first N of `source` (P, G, ...)."""
        target.copy_(source[:, : target.shape[1]])

    def fill_with_zeros(self, array: Any) -> None:
        """Fill an array with zeros."""
        array.zero_()


def usable_device(device: Any) -> torch.device:
    """Return the device; ConfigError for an unknown one, BackendError if it is not available."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"device {shown(device)} is unknown; give cpu, cuda or cuda:1") from error
    try:
        torch.empty(1, device=found).cpu()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # no GPU, no driver, or a build without GPU support
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackendError(
            f"torch cannot use {device} on this machine ({reason}); use cpu"
        ) from error
    return found


def _placed(stage: nn.Module, device: torch.device) -> nn.Module:
    """Return a stage on the device; one that is there is not touched.

    Moving a module shards its weights again if they are gathered from several processes.
    """
    wanted = torch.empty(0, device=device).device  # with the number that "cuda" stands for
    kept = (*stage.parameters(), *stage.buffers())
    return stage if all(each.device == wanted for each in kept) else stage.to(device)
