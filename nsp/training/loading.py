"""From data sets to the micro-batches of one process."""

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from nsp.data.reading_ahead import leave_signals_to_parent
from nsp.data.stream import ShardStream
from nsp.training.data_order import Share, StepSampler

Item = Mapping[str, object]


class _AtEpoch(Dataset[Item]):
    """A data set read by (epoch, index), so that workers reading ahead use the right epoch."""

    def __init__(self, data: Dataset[Item]) -> None:
        self.data = data
        self._set_epoch = getattr(data, "set_epoch", None)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        if self._set_epoch is not None:
            self._set_epoch(epoch)
        return self.data[index]


def training_loader(
    data: Dataset[Item],
    share: Share,
    *,
    start: int,
    stop: int,
    seed: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Item]:
    """Return the micro-batches of data steps `start` .. `stop` - 1; a stream has no end."""
    settings: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
    if isinstance(data, ShardStream):  # this process has its own part of it
        data.start_step = start * share.accumulate
        return data.loader(**settings)
    assert isinstance(data, Sized)  # StepSampler draws indices, so it must be map-style
    sampler = StepSampler(len(data), share, start=start, stop=stop, seed=seed)
    # A separate generator: the loader draws a seed for its workers when it starts. Drawn from
    # torch's generator, it would change the random numbers of the first step after a resumption.
    settings["generator"] = torch.Generator()
    settings["worker_init_fn"] = leave_signals_to_parent
    return DataLoader(_AtEpoch(data), batch_sampler=sampler, **settings)


def validation_loader(data: Dataset[Item], share: Share) -> tuple[DataLoader[Item], Share]:
    """Return full batches of `data`, the same every time, and this process's share of each."""
    assert isinstance(data, Sized)
    size = min(share.batch_size, len(data)) // share.world_size * share.world_size
    whole = Share(batch_size=size, rank=share.rank, world_size=share.world_size)
    sampler = StepSampler(len(data), whole, start=0, stop=len(data) // size, seed=0)
    return DataLoader(_AtEpoch(data), batch_sampler=sampler), whole
