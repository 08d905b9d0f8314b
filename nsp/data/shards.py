"""Finds the tar shards of a set, local or by URL, and reads a shard from beginning to end."""

import logging
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from nsp.data.bounds import MAX_CAPTION_BYTES, MAX_PICTURE_BYTES, check_size
from nsp.data.captions import captions_beside
from nsp.data.heldout import (
    HELDOUT_MEMBER,
    MAX_HELDOUT_BYTES,
    Heldout,
    is_heldout,
    parse_heldout,
    read_heldout,
)
from nsp.data.identity import Identity, Shard, identity_of_shards
from nsp.data.index import INDEX_FILE, ShardIndex, ShardRecord, parse_index, read_index
from nsp.data.pictures import PICTURE_SUFFIXES
from nsp.data.samples import (
    BESIDE_SUFFIXES,
    CLASS_SUFFIX,
    JSON_SUFFIX,
    TAR_SUFFIXES,
    Problem,
    check_key,
    is_hidden,
    leads_out,
    parse_caption,
    parse_class,
    picture_suffix,
    shown,
    tar_key,
)
from nsp.data.shard_files import check_scheme, expand, extract, line_of, local_path, opened
from nsp.data.shard_listing import MISSING
from nsp.data.tars import walk
from nsp.errors import DataError, MissingExtraError

logger = logging.getLogger(__name__)

_HEAD_PICTURES = 20  # first pictures, which show whether a set has captions


@dataclass(frozen=True)
class RawSample:
    """One captioned picture as stored in the shard; `content` is empty if it was skipped."""

    key: str
    captions: tuple[str, ...]  # empty in a set without any
    class_id: int  # -1: none
    content: bytes


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """The shards of a set, in order, and what is known before they are read."""

    urls: tuple[str, ...]
    records: Mapping[str, ShardRecord]  # by URL, for shards listed in an index.json
    class_names: tuple[str, ...]
    heldout: Heldout
    has_captions: bool  # by the first samples of the first shard; all have captions, or none

    def identity(self) -> Identity:
        """Return the identity of these shards, which does not depend on paths (see identity.py)."""
        return identity_of_shards([self._shard(url) for url in self.urls])

    def _shard(self, url: str) -> Shard:
        """Return file name, bytes and SHA-256 of a shard; unknown ones are None or empty."""
        name = url.partition("?")[0].rpartition("/")[2]  # after "?" there may be a token
        if record := self.records.get(url):
            return name, record.num_bytes, record.sha256
        path = local_path(url)
        return name, None if path is None else path.stat().st_size, ""


def find_shards(spec: str | Path, *, allow_commands: bool = False) -> ShardSet:
    """Return the shards of a folder, or of a path or URL with braces such as a-{000..127}.tar.

    The held-out list is collected from a file `__heldout__` next to local shards, from every local
    shard that no `index.json` lists (their members are listed once here), and from the first member
    of the first shard. Raises DataError for shards that do not exist, ConfigError for a URL that
    cannot be read; `pipe:` URLs run a shell command and need `allow_commands`.
    """
    try:
        import webdataset.gopen  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("webdataset", "train") from error
    urls = expand(spec)
    for url in urls:
        check_scheme(url, allow_commands)
    local = {url: path for url in urls if (path := local_path(url)) is not None}
    if missing := [str(path) for path in local.values() if not path.is_file()]:
        raise DataError(f"{spec}: {len(missing)} shards do not exist, first {missing[0]}")
    indexes = list(_indexes(urls))
    records = {
        f"{folder}/{record.file}" if folder else record.file: record
        for folder, index in indexes
        for record in index.shards
    }
    records = {url: records[url] for url in urls if url in records}
    rows = [row for path in {path.parent for path in local.values()} for row in read_heldout(path)]
    unlisted = [url for url in local if url not in records]
    if unlisted:
        logger.info("%s: searching %d shards for held-out lists", spec, len(unlisted))
    for url in unlisted:
        with suppress(tarfile.TarError, OSError):  # reported when the shard is read
            rows += _list_inside(url)
    has_captions = True
    try:
        first_rows, has_captions = _head(urls[0])
        rows += first_rows
    except (tarfile.TarError, OSError) as error:
        if urls[0] not in unlisted:
            raise DataError(f"{urls[0]}: {line_of(error)}; the first shard is needed") from error
    return ShardSet(
        urls=urls,
        records=records,
        class_names=next((index.class_names for _, index in indexes), ()),
        heldout=Heldout.of(rows),
        has_captions=has_captions,
    )


def wrong_sizes(shards: ShardSet) -> list[Problem]:
    """Return the local shards whose size differs from index.json."""
    found = []
    for url, record in shards.records.items():
        path = local_path(url)
        if path is not None and path.stat().st_size != record.num_bytes:
            reason = f"{path.stat().st_size} bytes, but {INDEX_FILE} says {record.num_bytes}"
            found.append(Problem(url, reason))
    return found


class ShardReader:
    """Reads the training samples of shards, without held-out ones. Copies may read elsewhere."""

    def __init__(self, known: ShardSet) -> None:
        self._known = known
        self._noted: set[str] = set()  # suffixes of unused members

    def read(self, url: str, *, skip: int = 0) -> Iterator[RawSample | Problem]:
        """Yield the samples in order; the first `skip` come without pictures, which is quick.

        A sample or shard that cannot be used gives a Problem instead. Raises DataError for a
        held-out list that was not known before: its samples may already have been yielded.
        """
        number, key = 0, "its head"
        try:
            with opened(url) as archive:
                for key, group in groupby(self._members(url, archive), key=lambda m: m.key):
                    found = self._sample(url, key, list(group), number >= skip)
                    if found is not None:
                        number += isinstance(found, RawSample)
                        yield found
        except (tarfile.TarError, OSError) as error:
            yield Problem(url, f"{line_of(error)}; its samples after {key} are lost")

    def _members(self, url: str, archive: tarfile.TarFile) -> Iterator["_Member"]:
        """Yield the members that belong to samples."""
        can_rewind = local_path(url) is not None
        for info in walk(archive):
            key, suffix = tar_key(info.name)
            if is_heldout(info.name):
                self._check_list(url, extract(archive, info, MAX_HELDOUT_BYTES))
            elif is_hidden(info.name) and not leads_out(key):
                continue
            elif suffix in TAR_SUFFIXES:
                content = None
                if not can_rewind:  # a member that is too long is refused when it is used
                    fits = info.size <= MAX_PICTURE_BYTES
                    content = extract(archive, info, MAX_PICTURE_BYTES) if fits else b""
                yield _Member(key, suffix, archive, info, content)
            else:
                self._note(url, suffix, info.name)

    def _check_list(self, url: str, content: bytes) -> None:
        rows = parse_heldout(content, where=f"{url}: {HELDOUT_MEMBER}")
        if unknown := set(rows) - self._known.heldout.rows:
            raise DataError(
                f"{url} lists {len(unknown)} held-out samples that the first shard does not list, "
                f"first {min(unknown)}; put the whole list first in every shard, like nsp data pack"
            )

    def _sample(
        self, url: str, key: str, members: list["_Member"], with_picture: bool
    ) -> RawSample | Problem | None:
        """Return one sample, or the problem with it; None when it is held out."""
        by_suffix: dict[str, _Member] = {}
        if {member.suffix for member in members} == {JSON_SUFFIX}:
            self._note(url, JSON_SUFFIX, members[0].info.name)
            return None
        try:
            check_key(key)
            for member in members:
                if member.suffix in by_suffix:
                    raise DataError(f"two members end in {member.suffix}")
                by_suffix[member.suffix] = member
            picture = by_suffix[picture_suffix(by_suffix)]
            captions = self._captions(by_suffix)
            class_id = -1
            if CLASS_SUFFIX in by_suffix:
                number = by_suffix[CLASS_SUFFIX].read(MAX_CAPTION_BYTES)
                class_id = parse_class(number, len(self._known.class_names))
            if self._known.heldout.covers(key, captions):
                return None
            content = picture.read(MAX_PICTURE_BYTES) if with_picture else b""
        except DataError as error:
            return Problem(f"{url}: {key}", str(error))
        return RawSample(key, captions, class_id, content)

    def _captions(self, by_suffix: Mapping[str, "_Member"]) -> tuple[str, ...]:
        """Return the captions of a sample; DataError if it has none but the set has captions."""
        texts = by_suffix.keys() & BESIDE_SUFFIXES
        found, _ = captions_beside(
            {each: partial(by_suffix[each].read, MAX_CAPTION_BYTES) for each in texts}
        )
        captions = tuple(dict.fromkeys(parse_caption(caption) for caption in found))
        if not captions and self._known.has_captions:
            raise DataError(MISSING)
        if captions and not self._known.has_captions:
            raise DataError("it has a caption, but the first samples of the set have none")
        return captions

    def _note(self, url: str, suffix: str, name: str) -> None:
        """Warn once about each suffix of unused members."""
        if suffix not in self._noted:
            self._noted.add(suffix)
            logger.warning("%s: not used: %s and others like it", url, shown(name))


@dataclass(frozen=True)
class _Member:
    """One member of a tar, with its content if the tar cannot be rewound."""

    key: str
    suffix: str
    archive: tarfile.TarFile
    info: tarfile.TarInfo
    content: bytes | None

    def read(self, most_bytes: int) -> bytes:
        """Return its content; DataError with only the reason if it is too large."""
        check_size(self.info.size, most_bytes)
        if self.content is None:
            return extract(self.archive, self.info, most_bytes)
        return self.content


def _indexes(urls: Iterable[str]) -> Iterator[tuple[str, ShardIndex]]:
    """Yield every index.json next to shards, with its folder as written in the URLs."""
    for folder in dict.fromkeys(url.rpartition("/")[0] for url in urls):
        path = local_path(f"{folder}/x")
        if path is not None:
            index = read_index(path.parent if folder else Path())
        elif folder.startswith("pipe:"):
            index = None
        else:
            index = _remote_index(f"{folder}/{INDEX_FILE}")
        if index is not None:
            yield folder, index


def _remote_index(url: str) -> ShardIndex | None:
    from webdataset.gopen import gopen

    try:
        with closing(gopen(url)) as file:
            return parse_index(file.read(), where=url)
    except Exception:  # from any library; the index's place is a guess, and it is not required
        logger.info("%s: not found; shards must be read even where they could be skipped", url)
        return None


def _list_inside(url: str) -> list[tuple[str, str]]:
    """Return the held-out rows from anywhere in a shard."""
    rows = []
    with opened(url) as archive:
        for info in walk(archive):
            if is_heldout(info.name):
                content = extract(archive, info, MAX_HELDOUT_BYTES)
                rows += parse_heldout(content, where=f"{url}: {HELDOUT_MEMBER}")
    return rows


def _head(url: str) -> tuple[list[tuple[str, str]], bool]:
    """Return the held-out rows at the beginning of a shard, and whether it has captions.

    In a set with captions a picture without one is a bad file; in other sets it is normal.
    """
    rows: list[tuple[str, str]] = []
    num_pictures = 0
    with opened(url) as archive:
        for number, info in enumerate(walk(archive)):
            suffix = tar_key(info.name)[1]
            if is_heldout(info.name) and number == 0:
                content = extract(archive, info, MAX_HELDOUT_BYTES)
                rows = parse_heldout(content, where=f"{url}: {HELDOUT_MEMBER}")
            elif is_hidden(info.name):
                continue
            elif suffix in BESIDE_SUFFIXES and _is_caption(archive, info, suffix):
                return rows, True
            num_pictures += suffix in PICTURE_SUFFIXES
            if num_pictures > _HEAD_PICTURES:
                break
    return rows, num_pictures == 0


def _is_caption(archive: tarfile.TarFile, info: tarfile.TarInfo, suffix: str) -> bool:
    try:
        found, _ = captions_beside({suffix: partial(extract, archive, info, MAX_CAPTION_BYTES)})
    except DataError:  # reported when the sample is read
        return suffix != JSON_SUFFIX
    return bool(found)
