"""A listing of a data set before any picture is decoded: samples, problems and other files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nsp.data.bounds import MAX_PICTURE_BYTES, read_regular
from nsp.data.pictures import PictureFile
from nsp.data.samples import Problem, Sample, parse_caption, shown
from nsp.errors import DataError


@dataclass(frozen=True)
class FileSlice:
    """A whole file, or a member of a tar."""

    path: Path
    offset: int = 0
    num_bytes: int = -1  # -1 means to the end of the file

    def size(self) -> int:
        """Return the number of bytes; raises OSError."""
        return self.path.stat().st_size if self.num_bytes < 0 else self.num_bytes

    def read(self, most_bytes: int = MAX_PICTURE_BYTES) -> bytes:
        """Return the bytes; opens the file each time, so threads and workers do not collide."""
        return read_regular(
            self.path, most_bytes=most_bytes, offset=self.offset, num_bytes=self.num_bytes
        )


@dataclass(frozen=True)
class Entry:
    """A sample, the place of its picture and, after reading, the digest of that file's bytes."""

    sample: Sample
    file: PictureFile
    digest: bytes = b""


@dataclass
class Listing:
    """What was found. Names come from the file system and are stored in printable form."""

    entries: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    heldout: list[tuple[str, str]] = field(default_factory=list)
    missing: str | None = (
        "no caption"  # the problem of a sample without one; None: no captions at all
    )

    def add(
        self,
        name: str,
        captions: Sequence[bytes | str],
        file: PictureFile,
        class_id: int | None = None,
    ) -> None:
        """Append a sample, and a problem when captions of it are empty or not UTF-8.

        If all its captions are, it is not a sample.
        """
        texts: dict[str, None] = {}
        reasons = []
        for caption in captions:
            try:
                texts[parse_caption(caption)] = None
            except DataError as error:
                reasons.append(str(error))
        if reasons:
            of = f"{len(reasons)} of its {len(captions)} captions: " if len(captions) > 1 else ""
            self.refuse(name, of + reasons[0])
        if texts or not captions:
            self.entries.append(Entry(Sample(shown(name), tuple(texts), class_id), file))

    def refuse(self, name: str, reason: str) -> None:
        """Append a problem."""
        self.problems.append(Problem(shown(name), reason))

    def leave(self, names: Iterable[str]) -> None:
        """Append names that are not used."""
        self.unused += [shown(name) for name in names]

    def settle(self) -> None:
        """Turn samples without a caption into problems, unless the set has no captions at all."""
        if self.missing is None:
            return
        bare = [entry.sample.name for entry in self.entries if not entry.sample.captions]
        self.entries = [entry for entry in self.entries if entry.sample.captions]
        self.problems += [Problem(name, self.missing) for name in bare]


def join(listings: Iterable[Listing]) -> Listing:
    """Return several listings as one, in their order."""
    joined = Listing(missing=None)
    for listing in listings:
        joined.entries += listing.entries
        joined.problems += listing.problems
        joined.unused += listing.unused
        joined.heldout += listing.heldout
        joined.class_names = joined.class_names or listing.class_names
        joined.missing = joined.missing or listing.missing
    return joined
