"""Statistics of a source: sizes, captions, classes, duplicates, bad and held-out files."""

import hashlib
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nsp.config import Config
from nsp.data.heldout import fold_caption
from nsp.data.listing import Entry
from nsp.data.pictures import picture_in_memory
from nsp.data.report import by_reason, summary
from nsp.data.samples import Sample
from nsp.data.sheet import contact_sheet
from nsp.data.sources import Survey
from nsp.errors import DataError
from nsp.files import write_file

MOST_NAMED = 20  # most sizes, words, classes and duplicates in a list
SHEET_PICTURES = 48
SHEET_SIDE_PX = 128
_ROWS_AT_ONCE = 32
_TITLE_LETTERS = 500  # more than a sheet has room for


@dataclass(frozen=True, kw_only=True)
class Spread(Config):
    """Minimum, median, mean and maximum of some numbers."""

    least: float
    median: float
    mean: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of one or more numbers."""
        return cls(
            least=min(values),
            median=statistics.median(values),
            mean=statistics.fmean(values),
            most=max(values),
        )


@dataclass(frozen=True, kw_only=True)
class Duplicates(Config):
    """Samples with the same picture or caption, and the first names of the largest groups."""

    num_groups: int
    num_extra: int  # samples beyond the first of each group
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class HeldoutStats(Config):
    """The held-out list compared with the samples."""

    num_listed: int
    num_found: int  # samples withheld from training, by name or by caption
    absent: tuple[str, ...]  # listed names without a sample
    num_by_caption_only: int  # withheld although the list does not name them
    same_picture: tuple[str, ...]  # training samples with the same picture as a held-out one


@dataclass(frozen=True, kw_only=True)
class Stats(Config):
    """The result of `nsp data stats`. Counters list the most frequent first."""

    place: str
    num_samples: int
    num_train: int
    num_bytes: int  # size of the picture files
    width_px: Spread
    height_px: Spread
    sizes: dict[str, int]
    num_sizes: int
    caption_words: Spread  # of every caption
    captions_per_picture: Spread
    num_captions: int  # number of different captions
    num_words: int  # number of different words, the vocabulary
    words: dict[str, int]
    classes: dict[str, int]
    duplicate_pictures: Duplicates
    duplicate_captions: Duplicates
    heldout: HeldoutStats
    reasons: dict[str, int]  # why files cannot be used, and how many
    problems: tuple[str, ...]  # every one of them, with its reason
    unused: tuple[str, ...]


@dataclass(frozen=True)
class _Look:
    """The facts about one picture."""

    size: tuple[int, int]
    num_bytes: int
    digest: bytes  # digest of size and pixels: the same for equal pictures in different files


def collect(found: Survey) -> Stats:
    """Return the statistics of what a survey found; DataError when it found no usable picture."""
    if not found.entries:
        bad = f", {len(found.problems)} bad files: {summary(found.problems)}"
        raise DataError(f"{found.place}: no usable picture{bad if found.problems else ''}")
    with ThreadPoolExecutor() as pool:  # decoding and hashing release the interpreter lock
        looks = list(pool.map(_look, found.entries))
    samples = [entry.sample for entry in found.entries]
    sizes = Counter("{}x{}".format(*look.size) for look in looks)
    texts = [caption for sample in samples for caption in sample.captions]
    words = Counter(word for text in texts for word in _words(text))
    classes = Counter(sample.class_id for sample in samples if sample.class_id is not None)
    named = {found.class_names[number]: count for number, count in classes.most_common()}
    heldout = _heldout(found, samples, looks)
    folded = [
        (sample.name, text)
        for sample in samples
        for text in dict.fromkeys(map(fold_caption, sample.captions))
    ]
    return Stats(
        place=found.place,
        num_samples=len(samples),
        num_train=len(samples) - heldout.num_found,
        num_bytes=sum(look.num_bytes for look in looks),
        width_px=Spread.of([look.size[0] for look in looks]),
        height_px=Spread.of([look.size[1] for look in looks]),
        sizes=dict(sizes.most_common(MOST_NAMED)),
        num_sizes=len(sizes),
        caption_words=Spread.of([len(text.split()) for text in texts] or [0]),
        captions_per_picture=Spread.of([len(sample.captions) for sample in samples]),
        num_captions=len({text for _, text in folded}),
        num_words=len(words),
        words=dict(words.most_common(MOST_NAMED)),
        classes=named | {name: 0 for name in found.class_names if name not in named},
        duplicate_pictures=_duplicates(
            (sample.name, look.digest) for sample, look in zip(samples, looks, strict=True)
        ),
        duplicate_captions=_duplicates(folded),
        heldout=heldout,
        reasons={reason: len(names) for reason, names in by_reason(found.problems)},
        problems=tuple(str(problem) for problem in found.problems),
        unused=tuple(found.unused),
    )


def sample_sheet(found: Survey, *, count: int = SHEET_PICTURES, seed: int = 0) -> Image.Image:
    """Return a contact sheet of random usable pictures, uncropped and with captions."""
    picks = np.random.default_rng(seed).permutation(len(found.entries))[:count]
    chosen = [found.entries[index] for index in sorted(picks.tolist())]
    side = min(SHEET_SIDE_PX, max(_longer_side(entry) for entry in chosen))
    padded = [_padded(entry, side) for entry in chosen]
    return contact_sheet(padded, [entry.sample.caption[:_TITLE_LETTERS] for entry in chosen])


def write_stats(stats: Stats, found: Survey, output_dir: Path, *, seed: int = 0) -> Path:
    """Write stats.json and samples.png, each atomically; return the path of the sheet."""
    with write_file(output_dir / "stats.json") as partial:
        partial.write_text(
            json.dumps(stats.to_dict(), ensure_ascii=False, indent=1) + "\n", "utf-8"
        )
    sheet = output_dir / "samples.png"
    with write_file(sheet) as partial:
        sample_sheet(found, seed=seed).save(partial, "PNG")
    return sheet


def _longer_side(entry: Entry) -> int:
    with picture_in_memory(entry.file) as (_, picture):
        return max(picture.size)


def _padded(entry: Entry, side: int) -> NDArray[np.uint8]:
    """Return the whole picture on a white square."""
    with picture_in_memory(entry.file) as (_, picture):
        fitted = ImageOps.pad(picture, (side, side), Image.Resampling.LANCZOS, color="white")
    return np.asarray(fitted, np.uint8)


def _look(entry: Entry) -> _Look:
    with picture_in_memory(entry.file) as (content, picture):
        digest = hashlib.sha256(repr(picture.size).encode())
        for top in range(
            0, picture.height, _ROWS_AT_ONCE
        ):  # a copy of the whole picture could be large
            bottom = min(top + _ROWS_AT_ONCE, picture.height)
            digest.update(picture.crop((0, top, picture.width, bottom)).tobytes())
        return _Look(picture.size, len(content), digest.digest())


def _words(caption: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", caption.casefold())


def _duplicates(named: Iterable[tuple[str, object]]) -> Duplicates:
    """Return the groups of names that have the same value."""
    groups: dict[object, list[str]] = defaultdict(list)
    for name, value in named:
        groups[value].append(name)
    repeated = sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)
    return Duplicates(
        num_groups=len(repeated),
        num_extra=sum(len(group) - 1 for group in repeated),
        groups=tuple(tuple(group[:MOST_NAMED]) for group in repeated[:MOST_NAMED]),
    )


def _heldout(found: Survey, samples: list[Sample], looks: list[_Look]) -> HeldoutStats:
    held = [found.heldout.covers(sample.name, sample.captions) for sample in samples]
    names = {sample.name for sample in samples}
    withheld = {look.digest for look, is_held in zip(looks, held, strict=True) if is_held}
    return HeldoutStats(
        num_listed=len(found.heldout.rows),
        num_found=sum(held),
        absent=tuple(sorted(found.heldout.names - names)),
        num_by_caption_only=sum(
            is_held and sample.name not in found.heldout.names
            for sample, is_held in zip(samples, held, strict=True)
        ),
        same_picture=tuple(
            sample.name
            for sample, look, is_held in zip(samples, looks, held, strict=True)
            if not is_held and look.digest in withheld
        ),
    )
