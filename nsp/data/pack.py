"""Packs any source into webdataset shards: the same source and options give the same bytes.

    OUTPUT_DIR/train-000000.tar     __heldout__ if the source lists any, then the samples
                                    <key>.<picture suffix>, <key>.txt with the first caption,
                                    <key>.json with all if there are more (see captions.py)
                                    and, for classes, <key>.cls
    OUTPUT_DIR/index.json           counts, sizes and SHA-256 of every shard (see index.py)

Pictures are copied unchanged. Held-out samples are packed with their list: all our readers exclude
them from training.
"""

import hashlib
import json
import logging
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from nsp.data.heldout import HELDOUT_MEMBER, Heldout, format_heldout
from nsp.data.index import INDEX_FILE, ShardIndex, ShardRecord
from nsp.data.pictures import picture_format
from nsp.data.samples import CAPTION_SUFFIX, CLASS_SUFFIX, JSON_SUFFIX, is_hidden
from nsp.data.sources import ImageSource, readable, survey
from nsp.data.tars import write_members
from nsp.errors import ConfigError
from nsp.files import write_folder

logger = logging.getLogger(__name__)

SHARD_SIZE_MB = 100  # default size, in 10**6 bytes
_MAX_KEY_BYTES = 80  # a plain tar header has space for 100, including the suffix
_SUFFIXES = {
    "AVIF": ".avif",
    "BMP": ".bmp",
    "GIF": ".gif",
    "JPEG": ".jpg",
    "JPEG2000": ".jp2",
    "MPO": ".jpg",  # a JPEG with more pictures after the first
    "PPM": ".ppm",
    "TIFF": ".tif",
    "WEBP": ".webp",
}

Member = tuple[str, bytes]


def pack(
    spec: str | Path,
    output_dir: Path,
    *,
    samples_per_shard: int | None = None,
    shard_size_mb: float | None = None,
    seed: int = 0,
    skip_bad_files: bool = False,
) -> ShardIndex:
    """Write the samples of all splits in an order drawn from `seed`; return the index.

    A shard has `samples_per_shard` samples or, without it, `shard_size_mb` (10**6 bytes). The order
    is random because a stream shuffles only a little: sorted classes would give batches of one
    class. Raises ConfigError for a folder that is not empty, DataError as `open_source`.
    """
    if samples_per_shard is not None and shard_size_mb is not None:
        raise ConfigError("samples per shard and shard size are both given; choose one")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise ConfigError(f"{output_dir} is not empty; give a new folder")
    found = readable(survey(spec), skip_bad_files=skip_bad_files)
    source = found.choose("all")
    keys = _keys(sample.name for sample in source.samples)
    renamed = dict(zip((sample.name for sample in source.samples), keys, strict=True))
    rows = sorted((renamed.get(name, name), caption) for name, caption in found.heldout.rows)
    heldout = Heldout.of(rows)
    most_bytes = int((shard_size_mb or SHARD_SIZE_MB) * 10**6)
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    shards: list[ShardRecord] = []
    with write_folder(output_dir) as partial:
        for batch in _cut(source, keys, order, samples_per_shard, most_bytes):
            name = f"train-{len(shards):06d}.tar"
            shards.append(_write_shard(partial / name, batch, source, keys, heldout))
        index = ShardIndex(
            num_samples=len(source),
            num_heldout=len(source) - sum(shard.num_train for shard in shards),
            class_names=source.class_names,
            shards=tuple(shards),
        )
        (partial / INDEX_FILE).write_text(json.dumps(index.to_dict(), indent=1) + "\n", "utf-8")
    logger.info("%s: %d samples in %d shards", output_dir, len(source), len(shards))
    return index


def suffix_of(content: bytes) -> str:
    """Return the ending of a picture's file name; raises DataError as `picture_format`."""
    return _SUFFIXES.get(picture_format(content), ".png")


def _cut(
    source: ImageSource,
    keys: list[str],
    order: list[int],
    most_samples: int | None,
    most_bytes: int,
) -> Iterator[dict[int, list[Member]]]:
    """Yield for each shard the members of its samples, sample by sample."""
    shard: dict[int, list[Member]] = {}
    num_bytes = 0
    for number in order:
        members = _members(source, keys[number], number)
        size = sum(512 + -(-len(content) // 512) * 512 for _, content in members)
        full = len(shard) == most_samples if most_samples else num_bytes + size > most_bytes
        if shard and full:
            yield shard
            shard, num_bytes = {}, 0
        shard[number] = members
        num_bytes += size
    if shard:
        yield shard


def _members(source: ImageSource, key: str, number: int) -> list[Member]:
    """Return the files of one sample, sorted by name."""
    sample, content = source.samples[number], source.files[number].read()
    # Readers use the content, not the suffix.
    suffix = suffix_of(content)
    members = [(key + suffix, content)]
    if sample.captions:
        members.append((key + CAPTION_SUFFIX, sample.caption.encode()))
    if len(sample.captions) > 1:
        listed = json.dumps({"captions": sample.captions}, ensure_ascii=False)
        members.append((key + JSON_SUFFIX, listed.encode()))
    if sample.class_id is not None:
        members.append((key + CLASS_SUFFIX, str(sample.class_id).encode()))
    return sorted(members)


def _write_shard(
    path: Path,
    batch: dict[int, list[Member]],
    source: ImageSource,
    keys: list[str],
    heldout: Heldout,
) -> ShardRecord:
    """Write one shard, beginning with the held-out list, and return its record."""
    members: list[Member] = []
    if heldout.rows:
        members.append((HELDOUT_MEMBER, format_heldout(sorted(heldout.rows)).encode()))
    members += [member for files in batch.values() for member in files]
    write_members(path, members)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    held = sum(heldout.covers(keys[number], source.samples[number].captions) for number in batch)
    return ShardRecord(
        file=path.name,
        num_samples=len(batch),
        num_train=len(batch) - held,
        num_bytes=path.stat().st_size,
        sha256=digest,
    )


def _keys(names: Iterable[str]) -> list[str]:
    """Return a key for each name: the name itself if tar files and their readers allow it."""
    taken: set[str] = set()
    keys = []
    for number, name in enumerate(names):
        folder, base = posixpath.split(posixpath.splitext(name)[0] if "." in name else name)
        key = posixpath.join(folder, base.replace(".", "_"))  # a key ends at the first dot
        # Readers skip hidden members.
        if len(key.encode()) > _MAX_KEY_BYTES or key in taken or is_hidden(key):
            end = key.encode()[-40:].decode(errors="ignore")
            key = f"{number:09d}-{end.replace('/', '-').replace('.', '_')}"
        taken.add(key)
        keys.append(key)
    return keys
