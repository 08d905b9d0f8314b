"""Pictures that were generated, with the captions they were generated from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from nsp.data.bounds import MAX_CAPTION_BYTES, MAX_PICTURE_BYTES, read_regular
from nsp.data.image_files import metadata_in
from nsp.data.picture_archive import open_pictures
from nsp.data.pictures import decode_rgb
from nsp.data.samples import is_picture, parse_caption
from nsp.data.sheet import CONTACT_SHEET_NAME
from nsp.errors import ConfigError, DataError

_MAX_CAPTIONS_BYTES = 256 << 20
_BLOCK = 32  # pictures of an archive read at once


class Captioned(Protocol):
    """Pictures with their captions."""

    def __len__(self) -> int:
        """Return the number of pictures."""

    def __iter__(self) -> Iterator[tuple[Image.Image, str]]:
        """Yield every picture in RGB with its caption."""


@dataclass(frozen=True)
class CaptionedArchive:
    """The pictures of an .npz with the lines of a file of captions."""

    path: Path
    captions: Sequence[str]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.captions)

    def __iter__(self) -> Iterator[tuple[Image.Image, str]]:
        """Yield every picture with its caption."""
        captions = iter(self.captions)
        for block in open_pictures(self.path).blocks(_BLOCK):
            for pixels in block:
                yield Image.fromarray(pixels), next(captions)


@dataclass(frozen=True)
class CaptionedFolder:
    """The picture files of a folder, by name; captions are given, or each file's own."""

    files: Sequence[Path]
    captions: Sequence[str] | None

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.files)

    def __iter__(self) -> Iterator[tuple[Image.Image, str]]:
        """Yield every picture with its caption; DataError for one without, and for a bad file."""
        for number, file in enumerate(self.files):
            try:
                content = read_regular(file, most_bytes=MAX_PICTURE_BYTES)
                picture, own = decode_rgb(content), metadata_in(content).get("prompt")
            except DataError as error:
                raise DataError(f"{file}: {error}") from error
            if self.captions is not None:
                own = self.captions[number]
            yield picture, own or _caption_beside(file)


def open_captioned(place: Path, captions: Path | None) -> Captioned:
    """Return the pictures of a folder or an .npz with their captions.

    `captions` has one line for every picture, in the order of the archive or of the files' names.
    Without it, a picture's caption is the prompt that `nsp generate` keeps in its file, or the text
    in NAME.txt. Raises ConfigError and DataError in one line for what does not fit.
    """
    lines = None if captions is None else _lines(captions)
    if place.is_dir():
        names = sorted(each.name for each in place.iterdir() if is_picture(each.name))
        files = [place / name for name in names if name != CONTACT_SHEET_NAME]
        _check(place, len(files), captions, lines)
        return CaptionedFolder(files, lines)
    num_pictures = open_pictures(place).shape[0]
    if lines is None:
        raise ConfigError(f"{place} has no captions: give one per line with --captions FILE")
    _check(place, num_pictures, captions, lines)
    return CaptionedArchive(place, lines)


def _check(
    place: Path, num_pictures: int, captions: Path | None, lines: Sequence[str] | None
) -> None:
    if not num_pictures:
        raise DataError(f"{place} has no pictures")
    if lines is not None and len(lines) != num_pictures:
        raise DataError(
            f"{captions} has {len(lines)} lines for {num_pictures} pictures in {place}; give one "
            "caption per line for each"
        )


def _lines(file: Path) -> list[str]:
    """Return the captions of a file; empty lines at its end are none."""
    try:
        text = parse_caption(read_regular(file, most_bytes=_MAX_CAPTIONS_BYTES))
        return [parse_caption(line) for line in text.split("\n")]
    except DataError as error:
        raise DataError(f"{file}: {error}; give one caption per line") from error


def _caption_beside(file: Path) -> str:
    """Return the caption in the text file beside a picture; DataError if there is none."""
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        raise DataError(
            f"{file} has no caption: nsp generate keeps its prompt in the file; otherwise give "
            f"{beside.name} beside it, or one caption per line with --captions FILE"
        )
    try:
        return parse_caption(read_regular(beside, most_bytes=MAX_CAPTION_BYTES))
    except DataError as error:
        raise DataError(f"{beside}: {error}") from error
