"""Opens captioned pictures: the embedded emoji set, a tar, or a folder, all as one ImageSource."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from nsp.data.layouts import (
    HELDOUT_MEMBER,
    LAYOUTS,
    Entry,
    FileSlice,
    Listing,
    Problem,
    Sample,
    list_folder,
    list_tar,
)
from nsp.data.pictures import decode_rgb
from nsp.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

__all__ = ["EMOJI_TAR", "ImageSource", "Sample", "Split", "open_source"]

EMOJI_TAR = Path(__file__).with_name("emoji.tar")
Split = Literal["train", "heldout", "all"]
_NUM_NAMED = 10  # bad files an error names before it counts the rest


@dataclass(frozen=True)
class ImageSource:
    """Captioned pictures that were all found readable; pixels are read on demand.

    `class_names` is empty unless the source is a folder of class folders; a sample's `class_id`
    is an index into it. Safe to share between threads and to pickle to worker processes.
    """

    samples: tuple[Sample, ...]
    class_names: tuple[str, ...]
    files: tuple[FileSlice, ...]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    def load(self, index: int) -> Image.Image:
        """Return picture `index` as RGB at its own size; DataError when it was damaged since."""
        try:
            return decode_rgb(self.files[index].read())
        except (OSError, DataError) as error:
            name = self.samples[index].name
            raise DataError(
                f"{name} in {self.files[index].path} was readable when training started and is not "
                f"now ({error}); restore the file and resume"
            ) from error


def open_source(
    spec: str | Path, *, split: Split = "train", skip_bad_files: bool = False
) -> ImageSource:
    """Return the samples of one split, after every file has been decoded once.

    `spec` is 'emoji' (the embedded set), a `.tar`, or a folder; nsp/data/layouts.py says which
    layouts are read. Where the source lists held-out samples (the emoji set does, and so does every
    copy of its tar), 'train' and 'heldout' part it by name and by caption; elsewhere 'train' is
    everything. Raises DataError naming the files that cannot be used; with `skip_bad_files` each
    is logged as a warning and left out.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split {split!r} is unknown; choose from {', '.join(get_args(Split))}")
    path = EMOJI_TAR if spec == "emoji" else Path(spec)
    listing = _list(path)
    if listing.unused:
        logger.warning("%s: not used: %s", path, _first(listing.unused))
    usable, undecodable = _decode_all(path, listing.entries)
    problems = listing.problems + undecodable
    if problems and not skip_bad_files:
        raise DataError(
            f"{path}: {len(problems)} files cannot be used: {_first(_describe(problems))}; repair "
            "or remove them, or leave them out with --skip-bad-files"
        )
    for line in _describe(problems):
        logger.warning("%s: left out %s", path, line)
    chosen = _choose(path, usable, listing.heldout, split)
    if not chosen:
        raise DataError(f"{path}: no usable picture in split {split!r}; accepted are {LAYOUTS}")
    logger.info("%s: %d samples in split %s", path, len(chosen), split)
    return ImageSource(
        samples=tuple(sample for sample, _ in chosen),
        class_names=listing.class_names,
        files=tuple(file for _, file in chosen),
    )


def _list(path: Path) -> Listing:
    if path.is_dir():
        return list_folder(path)
    if path.is_file() and path.suffix == ".tar":
        return list_tar(path)
    what = "neither a folder nor a .tar" if path.exists() else "not found"
    raise DataError(f"{path}: {what}; give 'emoji', a .tar, or a folder with {LAYOUTS}")


def _decode_all(path: Path, entries: list[Entry]) -> tuple[list[Entry], list[Problem]]:
    """Return the entries whose picture decodes, and a problem for each of the others."""
    started = time.monotonic()
    logger.info("%s: checking %d pictures", path, len(entries))
    with ThreadPoolExecutor() as pool:  # Pillow's decoders release the interpreter lock
        reasons = list(pool.map(_why_undecodable, (file for _, file in entries)))
    logger.info("%s: checked in %.1f s", path, time.monotonic() - started)
    usable = [entry for entry, reason in zip(entries, reasons, strict=True) if reason is None]
    problems = [
        Problem(sample.name, reason)
        for (sample, _), reason in zip(entries, reasons, strict=True)
        if reason is not None
    ]
    return usable, problems


def _why_undecodable(file: FileSlice) -> str | None:
    try:
        decode_rgb(file.read())
    except (OSError, DataError) as error:
        return str(error)
    return None


def _choose(
    path: Path, entries: list[Entry], heldout: list[tuple[str, str]], split: Split
) -> list[Entry]:
    """Return the entries of `split`; a caption counts as held out whatever its case and spacing."""
    if split == "all":
        return entries
    if split == "heldout" and not heldout:
        raise DataError(
            f"{path}: lists no held-out samples; add a file {HELDOUT_MEMBER} with a header line "
            "and name<TAB>caption lines at its top"
        )
    names = {name for name, _ in heldout}
    captions = {_fold(caption) for _, caption in heldout}
    absent = names - {sample.name for sample, _ in entries}
    if absent:
        logger.warning("%s: held out but not among the samples: %s", path, _first(sorted(absent)))
    wants_heldout = split == "heldout"
    return [
        (sample, file)
        for sample, file in entries
        if (sample.name in names or _fold(sample.caption) in captions) == wants_heldout
    ]


def _fold(caption: str) -> str:
    return " ".join(caption.casefold().split())


def _describe(problems: list[Problem]) -> list[str]:
    return [f"{problem.name} ({problem.reason})" for problem in problems]


def _first(lines: Sequence[str]) -> str:
    shown = ", ".join(lines[:_NUM_NAMED])
    rest = len(lines) - _NUM_NAMED
    return f"{shown} and {rest} more" if rest > 0 else shown
