"""Which samples each step sees: this depends on seed and step, not on the number of devices."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from nsp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Share:
    """One process's part of each optimizer step's batch, in micro-batches.

    The batch of a step is cut into `world_size` parts of equal length, and each part into
    `accumulate` micro-batches, so the samples of a step depend on neither number.
    """

    batch_size: int  # pictures of one optimizer step, over all processes
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        """Check that the batch can be cut."""
        if self.batch_size % (self.world_size * self.accumulate):
            raise ConfigError(
                f"batch_size={self.batch_size} cannot be cut into {self.world_size} processes x "
                f"{self.accumulate} micro-batches (accumulate); choose a multiple of "
                f"{self.world_size * self.accumulate}"
            )

    @property
    def micro_batch_size(self) -> int:
        """Samples of one forward pass of this process."""
        return self.batch_size // (self.world_size * self.accumulate)

    def positions(self) -> list[range]:
        """Return where each micro-batch of this process lies in the step's batch."""
        size = self.micro_batch_size
        first = self.rank * self.accumulate * size
        return [range(first + i * size, first + (i + 1) * size) for i in range(self.accumulate)]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (epoch, index) for data steps `start` .. `stop` - 1.

    Every epoch is a new permutation, cut into whole batches, so a run resumed at step k sees the
    same samples as without the interruption.
    """

    def __init__(self, size: int, share: Share, *, start: int, stop: int, seed: int) -> None:
        if share.batch_size > size:
            raise ConfigError(
                f"batch_size={share.batch_size} exceeds the {size} pictures of the data set; add "
                f"pictures, or give --batch-size {size} or less"
            )
        self.size, self.share = size, share
        self.start, self.stop, self.seed = start, stop, seed

    def __len__(self) -> int:
        """Return the number of micro-batches left."""
        return (self.stop - self.start) * self.share.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the (epoch, index) pairs of every micro-batch."""
        batch_size = self.share.batch_size
        per_epoch = self.size // batch_size
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.size, generator=generator)
            first = step % per_epoch * batch_size
            for positions in self.share.positions():
                yield [(epoch, int(order[first + position])) for position in positions]


def step_seed(seed: int, phase: str, step: int, rank: int) -> int:
    """Return the seed of torch's own generator for one step of one process."""
    key = (seed, zlib.crc32(phase.encode()), step, rank)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def sample_keys(share: Share, step: int, micro_batch: int, *, seed: int) -> Tensor:
    """Return a key (B,) int64 for every sample, from its place in the run alone."""
    positions = share.positions()[micro_batch]
    places = torch.arange(positions.start, positions.stop) + step * share.batch_size
    return (seed << 31) + (places & 0x7FFF_FFFF)


def sample_uniforms(keys_B: Tensor, count: int) -> Tensor:
    """Return uniforms (B, count) in [0, 1) on the CPU; row b depends on keys_B[b] alone.

    The random choices for a sample (a dropped condition, noise) then do not depend on the number of
    devices or on how a batch is cut. With torch's own generator they would.
    """
    rows = [np.random.Generator(np.random.Philox(key=int(key))) for key in keys_B.tolist()]
    return torch.from_numpy(np.stack([row.random(count, dtype=np.float32) for row in rows]))


def sample_normals(keys_B: Tensor, count: int) -> Tensor:
    """Return standard-normal numbers (B, count) on the CPU, like `sample_uniforms`."""
    apart = np.array([0, 0, 0, 1], np.uint64)  # so that they differ from those of `sample_uniforms`
    rows = [
        np.random.Generator(np.random.Philox(key=int(key), counter=apart))
        for key in keys_B.tolist()
    ]
    return torch.from_numpy(np.stack([row.standard_normal(count, np.float32) for row in rows]))
