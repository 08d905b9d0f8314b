"""Lists the samples of one tar: `<key>.<picture suffix>` with `<key>.txt`, `.caption` or `.json`.

It is uncompressed, as webdataset requires, and may have the number of a class in `<key>.cls`;
`index.json` next to it (see pack.py) names classes. It may have a list `__heldout__`.
"""

import posixpath
import tarfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from nsp.data.bounds import MAX_CAPTION_BYTES
from nsp.data.captions import captions_beside
from nsp.data.heldout import HELDOUT_MEMBER, MAX_HELDOUT_BYTES, is_heldout, parse_heldout
from nsp.data.index import read_index
from nsp.data.listing import FileSlice, Listing
from nsp.data.samples import (
    BESIDE_SUFFIXES,
    CLASS_SUFFIX,
    JSON_SUFFIX,
    TAR_SUFFIXES,
    check_key,
    is_hidden,
    leads_out,
    parse_class,
    picture_suffix,
    tar_key,
)
from nsp.data.tars import open_tar, walk
from nsp.errors import DataError

MISSING = "the tar has no .txt with its caption"


def list_tar(path: Path) -> Listing:
    """Return the content of an uncompressed tar; raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file, open_tar(file, seekable=True) as archive:
            members = list(walk(archive))
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{path}: not a complete, uncompressed tar ({error}); decompress a compressed one first"
        ) from error
    listing = Listing(missing=None)
    index = read_index(path.parent)
    if index is not None and path.name in {shard.file for shard in index.shards}:
        listing.class_names = index.class_names
    samples: dict[str, dict[str, FileSlice]] = {}
    repeated: dict[str, str] = {}
    for member in sorted(members, key=lambda member: posixpath.normpath(member.name)):
        held = FileSlice(path, member.offset_data, member.size)
        key, suffix = tar_key(member.name)
        if is_heldout(member.name):  # joined tars may have several lists
            content = held.read(MAX_HELDOUT_BYTES)
            listing.heldout += parse_heldout(content, where=f"{path}: {HELDOUT_MEMBER}")
        elif is_hidden(member.name) and not leads_out(key):
            continue
        elif suffix not in TAR_SUFFIXES:
            listing.leave([posixpath.normpath(member.name)])
        elif suffix in samples.setdefault(key, {}):
            repeated[key] = suffix
        else:
            samples[key][suffix] = held
    for key, by_suffix in samples.items():
        if by_suffix.keys() == {JSON_SUFFIX}:
            listing.leave([key + JSON_SUFFIX])
        elif key in repeated:
            listing.refuse(key, f"two members end in {repeated[key]}")
        else:
            _add(listing, key, by_suffix)
    return listing


def _add(listing: Listing, key: str, by_suffix: Mapping[str, FileSlice]) -> None:
    """Add one sample, or the reason why it is not a sample."""
    texts = by_suffix.keys() & BESIDE_SUFFIXES
    try:
        check_key(key)
        picture = by_suffix[picture_suffix(by_suffix)]
        captions, _ = captions_beside(
            {suffix: partial(by_suffix[suffix].read, MAX_CAPTION_BYTES) for suffix in texts}
        )
        class_id = None
        if CLASS_SUFFIX in by_suffix:
            content = by_suffix[CLASS_SUFFIX].read(MAX_CAPTION_BYTES)
            class_id = parse_class(content, len(listing.class_names))
    except DataError as error:
        listing.refuse(key, str(error))
    else:
        listing.add(key, captions, picture, class_id)
    if texts - {JSON_SUFFIX} or (listing.entries and listing.entries[-1].sample.captions):
        listing.missing = MISSING
