"""Opens captioned pictures from any kind of place as one ImageSource."""

import importlib.util
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from nsp.data.heldout import HELDOUT_MEMBER, Heldout, read_heldout
from nsp.data.identity import Identity, digest_of, identity_of
from nsp.data.layouts import LAYOUTS, list_folder
from nsp.data.listing import Entry, Listing
from nsp.data.pictures import PictureFile, decode_rgb, picture_in_memory
from nsp.data.report import first, summary
from nsp.data.samples import Problem, Sample, shown
from nsp.data.shard_listing import list_tar
from nsp.distribution import install_emoji
from nsp.errors import ConfigError, DataError
from nsp.paths import wrong_path
from nsp.sniff import sniff

logger = logging.getLogger(__name__)

__all__ = [
    "EMOJI_TAR",
    "ImageSource",
    "Sample",
    "Split",
    "Survey",
    "emoji_tar",
    "open_source",
    "readable",
    "survey",
]

EMOJI_TAR = Path(__file__).with_name("emoji.tar")  # in a checkout; wheels have it separately
EMOJI_PACKAGE = "nsp_emoji_data"
HUB_PREFIX = "hf:"
Split = Literal["train", "heldout", "all"]
_MOST_WARNINGS = 20  # bad files with a warning of their own; the rest is counted


@dataclass(frozen=True)
class ImageSource:
    """Pictures that were all checked and are readable; pixels are read on demand.

    `class_names` is empty unless the source is a folder of class folders; a sample's `class_id`
    is an index into it. `digests` are those of the files' bytes when they were checked. Safe to
    share between threads and to pickle to worker processes.
    """

    samples: tuple[Sample, ...]
    class_names: tuple[str, ...]
    files: tuple[PictureFile, ...]
    digests: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    @property
    def has_captions(self) -> bool:
        """Return whether the samples have captions: either all have one, or none."""
        return all(sample.captions for sample in self.samples)

    def part(self, indices: Sequence[int]) -> "ImageSource":
        """Return only these samples, in this order."""
        return replace(
            self,
            samples=tuple(self.samples[index] for index in indices),
            files=tuple(self.files[index] for index in indices),
            digests=tuple(self.digests[index] for index in indices) if self.digests else (),
        )

    def identity(self) -> Identity:
        """Return the identity of these samples, which depends on no path (see identity.py)."""
        digests = self.digests or [digest_of(file.read()) for file in self.files]
        return identity_of(self.samples, digests)

    def load(self, index: int) -> Image.Image:
        """Return picture `index` as RGB at its own size; DataError if it is damaged now."""
        try:
            return decode_rgb(self.files[index].read())
        except (OSError, DataError) as error:
            name = self.samples[index].name
            raise DataError(
                f"{name} in {self.files[index].path} was readable when training started but is not "
                f"now ({error}); restore the file and resume"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Everything found at a place, usable or not, before a split is chosen."""

    place: str
    entries: list[Entry]  # those with a picture that can be decoded
    problems: list[Problem]
    unused: list[str]
    class_names: tuple[str, ...]
    heldout: Heldout

    def choose(self, split: Split) -> ImageSource:
        """Return the samples of one split; DataError when there are none."""
        chosen = _choose(self.place, self.entries, self.heldout, split)
        if not chosen:
            why = f" ({summary(self.problems)})" if self.problems else ""
            raise DataError(
                f"{self.place}: no usable picture in split {split!r}{why}; accepted are {LAYOUTS}"
            )
        return ImageSource(
            samples=tuple(entry.sample for entry in chosen),
            class_names=self.class_names,
            files=tuple(entry.file for entry in chosen),
            digests=tuple(entry.digest for entry in chosen),
        )


def emoji_tar() -> Path:
    """Return the embedded set of the checkout, otherwise of its own installed package.

    Raises DataError with the command that installs it when there is neither.
    """
    if EMOJI_TAR.exists():
        return EMOJI_TAR
    package = importlib.util.find_spec(EMOJI_PACKAGE)
    if package is None or package.origin is None:
        raise DataError(f"the data set 'emoji' is not installed; run: {install_emoji()}")
    return Path(package.origin).with_name(EMOJI_TAR.name)


def open_source(
    spec: str | Path, *, split: Split = "train", skip_bad_files: bool = False
) -> ImageSource:
    """Return the samples of one split, after every file has been decoded once.

    `spec` is 'emoji' (the embedded set), a `.tar`, a folder, or 'hf:NAME_OR_FOLDER[:SPLIT]' (a data
    set that Hugging Face's `datasets` reads); nsp/data/layouts.py and nsp/data/hub.py say how each
    is read. If the source lists held-out samples (the emoji set does, and so does every copy of
    its tar), it is divided into 'train' and 'heldout' by name and by caption, and 'train' has no
    copies of held-out pictures; otherwise 'train' is everything.
    Raises DataError naming the files that cannot be used; with `skip_bad_files` each is logged as a
    warning and left out.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split {split!r} is unknown; choose from {', '.join(get_args(Split))}")
    found = readable(survey(spec), skip_bad_files=skip_bad_files)
    source = found.choose(split)
    logger.info("%s: %d samples in split %s", found.place, len(source), split)
    return source


def readable(found: Survey, *, skip_bad_files: bool) -> Survey:
    """Return the survey; DataError naming the unusable files, or a warning for each."""
    if found.problems and not skip_bad_files:
        raise DataError(
            f"{found.place}: {len(found.problems)} files cannot be used: "
            f"{summary(found.problems)}; repair or remove them, or leave them out with "
            "--skip-bad-files"
        )
    for problem in found.problems[:_MOST_WARNINGS]:
        logger.warning("%s: left out %s", found.place, problem)
    if rest := found.problems[_MOST_WARNINGS:]:
        logger.warning("%s: left out %d more: %s", found.place, len(rest), summary(rest))
    return found


def survey(spec: str | Path) -> Survey:
    """Return what is found at `spec`, each picture decoded once; DataError if it is no source."""
    where, listing = _list(str(spec))
    place = shown(where)  # a log file cannot contain lone surrogates
    listing.settle()
    if listing.unused:
        logger.warning("%s: not used: %s", place, first(listing.unused))
    usable, undecodable = _decode_all(place, listing.entries)
    return Survey(
        place=place,
        entries=usable,
        problems=listing.problems + undecodable,
        unused=listing.unused,
        class_names=listing.class_names or _numbered_classes(usable),
        heldout=Heldout.of(listing.heldout),
    )


def _numbered_classes(entries: list[Entry]) -> tuple[str, ...]:
    """Return names for classes that have only numbers."""
    numbers = [number for entry in entries if (number := entry.sample.class_id) is not None]
    return tuple(str(number) for number in range(max(numbers, default=-1) + 1))


def _list(spec: str) -> tuple[str, Listing]:
    """Return the place as named in messages, and its listing."""
    if spec.startswith(HUB_PREFIX):
        from nsp.data.hub import list_rows

        return spec, list_rows(spec.removeprefix(HUB_PREFIX))
    path = emoji_tar() if spec == "emoji" else Path(spec)
    if os.path.isdir(path):
        return str(path), list_folder(path)
    if path.suffix == ".tar" and os.path.isfile(path) and not sniff(path).is_spoilt:
        listing = list_tar(path)
        listing.heldout += read_heldout(path.parent)  # shards have the list next to them
        return str(path), listing
    accepted = f"'emoji', a .tar, hf:NAME, or a folder with {LAYOUTS}"
    raise DataError(f"{wrong_path(path, 'data')}; accepted are {accepted}")


def _decode_all(place: str, entries: list[Entry]) -> tuple[list[Entry], list[Problem]]:
    """Return the entries whose picture can be decoded, and a problem for each other entry."""
    started = time.monotonic()
    logger.info("%s: checking %d pictures", place, len(entries))
    with ThreadPoolExecutor() as pool:  # Pillow's decoders release the interpreter lock
        found = list(pool.map(_checked, entries))
    logger.info("%s: checked in %.1f s", place, time.monotonic() - started)
    usable = [each for each in found if isinstance(each, Entry)]
    return usable, [each for each in found if isinstance(each, Problem)]


def _checked(entry: Entry) -> Entry | Problem:
    """Return the entry with its picture's digest, or the reason why that cannot be decoded."""
    try:
        with picture_in_memory(entry.file) as (content, _):
            return replace(entry, digest=digest_of(content))
    except (OSError, DataError) as error:
        return Problem(entry.sample.name, _reason(error))


def _reason(error: OSError | DataError) -> str:
    """Return why a file cannot be used, without its name, so that equal reasons can be counted."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return str(error)


def _choose(place: str, entries: list[Entry], heldout: Heldout, split: Split) -> list[Entry]:
    """Return the entries of `split`."""
    if split == "all":
        return entries
    if split == "heldout" and not heldout.rows:
        raise DataError(
            f"{place}: there is no list of held-out samples; add a file {HELDOUT_MEMBER} at the "
            "top, with a header line and lines of name<TAB>caption"
        )
    absent = heldout.names - {entry.sample.name for entry in entries}
    if absent:
        logger.warning("%s: held out but not among the samples: %s", place, first(sorted(absent)))
    covered = [each for each in entries if heldout.covers(each.sample.name, each.sample.captions)]
    if split == "heldout" or not covered:
        return covered if split == "heldout" else entries
    # Otherwise training would see a held-out picture under another name and caption.
    pictures = {entry.digest for entry in covered}
    names = {entry.sample.name for entry in covered}
    rest = [entry for entry in entries if entry.sample.name not in names]
    copies = [entry.sample.name for entry in rest if entry.digest in pictures]
    if copies:
        logger.info("%s: copies of held-out pictures, left out: %s", place, first(copies))
    return [entry for entry in rest if entry.sample.name not in set(copies)]
