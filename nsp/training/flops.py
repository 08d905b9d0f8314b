"""The number of operations per training image, for the throughput in TFLOP/s."""

from collections.abc import Mapping
from itertools import islice

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate
from torch.utils.flop_counter import FlopCounterMode

from nsp.family.objective import Objective
from nsp.training.data_order import Share, sample_keys

_BACKWARD = 2  # a backward pass costs about two forward passes


@torch.no_grad()
def flops_per_image(
    objective: Objective, data: Dataset[Mapping[str, object]], batch_size: int
) -> float:
    """Return the floating-point operations of one image's forward and backward pass.

    One forward pass is counted, before anything is sharded or compiled, with no gradient and in
    evaluation mode: it leaves no trace.
    """
    device = next(objective.parameters()).device
    if isinstance(data, IterableDataset):
        first = list(islice(iter(data), batch_size))
    else:
        first = [data[index] for index in range(batch_size)]
    items = default_collate(first)
    batch = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in items.items()}
    keys = sample_keys(Share(batch_size=batch_size), 0, 0, seed=0)
    objective.eval()
    with FlopCounterMode(display=False) as counter:
        objective({**batch, "key": keys})
    return float((1 + _BACKWARD) * counter.get_total_flops() / batch_size)
