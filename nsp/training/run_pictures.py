"""The pictures of a run as configured: listed or streamed, for training and held out."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nsp.data.bounds import read_regular
from nsp.data.codes import CodeDataset, CodeSource, is_code_folder, open_codes
from nsp.data.dataset import ImageDataset
from nsp.data.heldout import HELDOUT_MEMBER, MAX_HELDOUT_BYTES, Heldout, parse_heldout
from nsp.data.shards import ShardSet, find_shards
from nsp.data.sources import ImageSource, open_source, readable, survey
from nsp.data.stream import ShardStream
from nsp.errors import ConfigError, DataError
from nsp.family.recipe import DataConfig, RunConfig
from nsp.training.data_order import Share


@dataclass(frozen=True)
class Pictures:
    """The pictures that a run trains on, and those held out from training."""

    train: ImageSource | ShardSet
    held_out: ImageSource | None
    skip_bad_files: bool

    @property
    def source(self) -> ImageSource | None:
        """The listed pictures; None for a stream."""
        return self.train if isinstance(self.train, ImageSource) else None

    @property
    def are_codes(self) -> bool:
        """Whether there is only a folder of codes."""
        return isinstance(self.train, CodeSource)

    @property
    def named_by_class(self) -> tuple[str, ...]:
        """The names of the class folders, if they are the captions of the listed pictures."""
        if self.source is None or not self.source.has_captions:
            return ()
        names = self.source.class_names
        is_named = {sample.captions for sample in self.source.samples} <= {(n,) for n in names}
        return names if is_named else ()

    @property
    def without_captions(self) -> str | None:
        """The pictures without captions, as a message names them; None if all have captions."""
        if not self.train.has_captions:
            return "the pictures to train on have"
        if self.held_out is not None and not self.held_out.has_captions:
            return "the pictures to validate on have"
        return None

    def __str__(self) -> str:
        """Return the number of pictures in words."""
        if isinstance(self.train, ImageSource):
            return f"{len(self.train)} pictures"
        return f"a stream of {len(self.train.urls)} shards"

    def to_train(self, size_px: int, run: RunConfig, share: Share) -> ImageDataset | ShardStream:
        """Return the training set at `size_px`; for a stream, this process's part of it."""
        crop, flip, seed = run.data.crop, run.data.flip, run.seed
        if isinstance(self.train, CodeSource):
            return CodeDataset(self.train, size_px, train=True, crop=False, seed=seed)
        if isinstance(self.train, ImageSource):
            return ImageDataset(self.train, size_px, train=True, crop=crop, flip=flip, seed=seed)
        return ShardStream(
            self.train,
            size_px,
            batch_size=share.micro_batch_size,
            train=True,
            crop=crop,
            flip=flip,
            seed=seed,
            rank=share.rank,
            world_size=share.world_size,
            skip_bad_files=self.skip_bad_files,
        )

    def to_judge(self, size_px: int, run: RunConfig, share: Share) -> ImageDataset | ShardStream:
        """Return the training set as `to_train` does, but listed pictures without augmentation."""
        if isinstance(self.train, ImageSource):
            return ImageDataset(self.train, size_px, train=False, crop=run.data.crop, cache_bytes=0)
        return self.to_train(size_px, run, share)

    def to_validate(self, size_px: int, run: RunConfig) -> ImageDataset | None:
        """Return the held-out pictures at `size_px`, if there are any."""
        if self.held_out is None:
            return None
        return ImageDataset(self.held_out, size_px, train=False, crop=run.data.crop)


def open_pictures(config: DataConfig, *, skip_bad_files: bool) -> Pictures:
    """Return the pictures of a run; every listed one was opened and is readable.

    Raises DataError for files that cannot be used, ConfigError for held-out pictures in the
    training set and for settings that a stream does not support.
    """
    if config.stream:
        if config.token_cache is not None or config.heldout is not None:
            raise ConfigError(
                "a stream is not listed ahead: data.token_cache and data.heldout are only for "
                "listed pictures; shards have their own list of held-out pictures"
            )
        return Pictures(find_shards(config.source), None, skip_bad_files)
    if is_code_folder(config.source):
        given = ("crop", "flip", "heldout", "val_share", "token_cache", "validation")
        if used := [name for name in given if getattr(config, name)]:
            raise ConfigError(
                f"data.{used[0]} is for pictures, but {config.source} is a folder of codes; omit it"
            )
        return Pictures(open_codes(config.source), None, skip_bad_files)
    found = readable(survey(config.source), skip_bad_files=skip_bad_files)
    train = found.choose("train")
    if config.heldout is not None:
        _check_held_out(train, config.heldout)
    held_out = found.choose("heldout") if found.heldout.rows else None
    if config.validation is not None:
        held_out = open_source(config.validation, split="all", skip_bad_files=skip_bad_files)
    if config.val_share is not None:
        if held_out is not None:
            raise ConfigError(
                f"data.val_share: {config.source} has a validation split of its own "
                f"({HELDOUT_MEMBER}, {len(held_out)} pictures); omit --val-share"
            )
        train, held_out = _divided(train, config.val_share)
    return Pictures(train, held_out, skip_bad_files)


def _divided(source: ImageSource, share: float) -> tuple[ImageSource, ImageSource]:
    """Return the pictures to train on and a share of all, at least one, to validate on.

    The name of a picture alone decides, so neither the order nor further pictures move it. If no
    name is chosen, the nearest one is.
    """
    digests = [hashlib.sha256(sample.name.encode()).digest()[:8] for sample in source.samples]
    ranks = [int.from_bytes(digest, "big") for digest in digests]
    limit = max(int(share * 2**64), min(ranks) + 1)
    held_out = [index for index, rank in enumerate(ranks) if rank < limit]
    rest = [index for index, rank in enumerate(ranks) if rank >= limit]
    if not rest:
        raise ConfigError(
            f"data.val_share {share:g} leaves none of {len(ranks)} pictures to train on; give a "
            "smaller share"
        )
    return source.part(rest), source.part(held_out)


def _check_held_out(source: ImageSource, path: str) -> None:
    """Raise ConfigError when pictures to train on have captions of the list at `path`."""
    try:
        content = read_regular(Path(path), most_bytes=MAX_HELDOUT_BYTES)
        rows = parse_heldout(content, where=path)
    except (OSError, DataError) as error:
        raise ConfigError(f"data.heldout: {path} cannot be read ({error})") from error
    heldout = Heldout.of(rows)
    seen = [each for each in source.samples if heldout.covers(each.name, each.captions)]
    if seen:
        raise ConfigError(
            f"{len(seen)} pictures to train on are held out by {path}, the first is {seen[0].name} "
            f"({seen[0].caption!r}); put the list next to the pictures as {HELDOUT_MEMBER}, "
            "or remove these pictures"
        )
