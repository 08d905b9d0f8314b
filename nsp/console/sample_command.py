"""`nsp generate --npz`: the set of pictures that a class model is evaluated with."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from nsp.console.terminal import print_json, progress_bar
from nsp.data.bounds import read_regular
from nsp.errors import ConfigError, DataError
from nsp.family.order import Sampling
from nsp.files import read_array
from nsp.paths import check_output
from nsp.pipeline.orders import choose_batch_size
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.sample_set import SampleSet, Shard, make_samples
from nsp.values import shown

NUM_IMAGES = 50_000  # of the ADM protocol
_RANDOM = "random"
_MAX_LABEL_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedSet:
    """A set before its model is loaded."""

    folder: Path
    labels: NDArray[np.int64] | None  # None: random ones
    shard: Shard

    def make(
        self,
        pipeline: Pipeline,
        *,
        sampling: Sampling,
        given: Mapping[str, Path],
        num_images: int | None,
        seed: int,
        size_px: int | None,
        batch_size: int | None,
        as_json: bool,
    ) -> None:
        """Make this process's share, and report where the set is or that others are not done."""
        _refuse({f"--{name.replace('_', '-')}": file for name, file in given.items()})
        wanted = SampleSet(
            pipeline=pipeline,
            folder=self.folder,
            num_images=num_images or NUM_IMAGES,
            seed=seed,
            sampling=sampling,
            labels=self.labels,
            size_px=size_px,
        )
        size = choose_batch_size(pipeline, batch_size)
        with progress_bar() as show:
            path = make_samples(wanted, shard=self.shard, batch_size=size, on_progress=show)
        if as_json:
            print_json(
                {
                    "backend": pipeline.backend.name,
                    "num_images": wanted.num_images,
                    "shard": [self.shard.index, self.shard.count],
                    "archive": str(wanted.archive),
                    "is_complete": path is not None,
                }
            )
        elif path is not None:
            click.echo(f"{path}  {wanted.num_images} images")
        else:
            click.echo(f"shard {self.shard.index}/{self.shard.count} is done; others are not")


def planned_set(
    folder: Path, labels: str | None, shard: str | None, one_by_one: Mapping[str, object]
) -> PlannedSet:
    """Return the set of a command line; `one_by_one` are its options about single pictures.

    Raises ConfigError for one of these, for labels that cannot be read, and for a wrong shard.
    """
    check_output(folder)
    _refuse(one_by_one)
    return PlannedSet(folder=folder, labels=read_labels(labels), shard=_shard(shard))


def _refuse(one_by_one: Mapping[str, object]) -> None:
    for name, value in one_by_one.items():
        if value:
            raise ConfigError(f"--npz makes a set of pictures; {name} does not belong to it")


def _shard(given: str | None) -> Shard:
    """Return this process's share: given as I/N, or as torchrun says."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if given is None:
        if rank is None or world is None:
            return Shard()
        return Shard(_count("RANK", rank), _count("WORLD_SIZE", world))
    index, slash, count = given.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--shard {shown(given)} is not I/N with 0 <= I < N, for example 0/4")
    return Shard(int(index), int(count))


def device_of_process(device: str | None, checkpoint: Path | None) -> str | None:
    """Return the device: with torchrun, a checkpoint runs on the GPU of this process's number."""
    local = os.environ.get("LOCAL_RANK")
    if device is not None or checkpoint is None or local is None:
        return device
    import torch

    if not torch.cuda.is_available():
        return None
    return f"cuda:{_count('LOCAL_RANK', local) % torch.cuda.device_count()}"


def _count(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {name} is {shown(text)}, not a number")
    return int(text)


def read_labels(text: str | None) -> NDArray[np.int64] | None:
    """Return the classes in a file, one per line or an .npy; None for random ones."""
    if text is None or text == _RANDOM:
        return None
    path = Path(text)
    if not path.exists():
        raise ConfigError(f"--labels {shown(text)} is neither random nor an existing file")
    if path.suffix == ".npy":
        array = read_array(path)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ConfigError(f"{path} is {array.dtype} {array.shape}; expected integers (N,)")
        return array.astype(np.int64)
    try:
        lines = read_regular(path, most_bytes=_MAX_LABEL_BYTES).decode("ascii").split()
        return np.array([int(line) for line in lines], np.int64)
    except (ValueError, OverflowError, DataError) as error:
        raise ConfigError(f"{path} does not have one class number per line ({error})") from error
