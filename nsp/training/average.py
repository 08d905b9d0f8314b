"""The moving average of the weights (EMA), kept next to them on every device."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """Return the part of a (possibly sharded) tensor that this process holds."""
    part = tensor.detach()
    return part.to_local() if hasattr(part, "to_local") else part


class WeightAverage:
    """Exponential moving average of the trained parameters; each process averages its shards.

    torch's `AveragedModel` copies the module, which is impossible for fully sharded modules.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._live = [p for p in parameters if p.requires_grad]
        self._decay = decay
        self.tensors: list[Tensor] = [local(p).clone() for p in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimizer step `step`; the first step copies them."""
        live = [local(p) for p in self._live]
        weight = 1.0 if step == 0 else 1 - self._decay
        torch._foreach_lerp_(self.tensors, live, weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the live weights; a second call undoes it."""
        for parameter, averaged in zip(self._live, self.tensors, strict=True):
            live = local(parameter)
            kept = live.clone()
            live.copy_(averaged)
            averaged.copy_(kept)

    def full_tensors(self) -> list[Tensor]:
        """Return the whole averaged tensors on the CPU; every process must call this."""
        return [
            full(_like(parameter, part)).cpu()
            for parameter, part in zip(self._live, self.tensors, strict=True)
        ]

    @torch.no_grad()
    def load(self, tensors: Sequence[Tensor]) -> None:
        """Load whole averaged tensors, as `full_tensors` returned them."""
        for parameter, part, whole in zip(self._live, self.tensors, tensors, strict=True):
            part.copy_(local(_spread(parameter, whole)))


def full(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all its shards; every process must call this."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _like(parameter: Tensor, part: Tensor) -> Tensor:
    """Return the local `part` as a tensor sharded like `parameter`."""
    sharded: Any = parameter.detach()
    if not hasattr(sharded, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )


def _spread(parameter: Tensor, whole: Tensor) -> Tensor:
    """Return `whole` sharded like `parameter`."""
    sharded: Any = parameter.detach()
    if not hasattr(sharded, "to_local"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        whole.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None
    )


@torch.no_grad()
def write_rows(parameter: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write whole rows of a (possibly sharded) parameter, the same on every process."""
    whole = full(parameter.detach()).clone()
    whole[rows] = values.to(whole.dtype)
    local(parameter).copy_(local(_spread(parameter, whole)))
