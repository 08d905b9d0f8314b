"""Writes a data set of the hub into a local folder of pictures, in a form that all readers read.

    OUTPUT/000000.jpg ...       pictures as they are in the set, byte for byte
    OUTPUT/metadata.jsonl       their captions; none in a set without captions
    OUTPUT/CLASS/000000.jpg     instead of both, for a set of classes without texts

Classes are numbered in the order of their folders' names, which is not the set's own order if that
differs.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from nsp.data.pack import suffix_of
from nsp.data.samples import Sample
from nsp.data.sources import HUB_PREFIX, ImageSource, open_source
from nsp.errors import ConfigError, DataError
from nsp.files import write_folder

logger = logging.getLogger(__name__)

_METADATA = "metadata.jsonl"


def download(
    name: str, output: Path, *, split: str | None = None, skip_bad_files: bool = False
) -> ImageSource:
    """Write one split (`train`, or the only one) of a set on the hub to a new folder.

    `name` may also be a folder that `datasets` reads. Raises ConfigError for a folder that is not
    empty, and DataError as `open_source`, also without network.
    """
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; give a new folder")
    place = name.removeprefix(HUB_PREFIX) + ("" if split is None else f":{split}")
    found = open_source(HUB_PREFIX + place, split="all", skip_bad_files=skip_bad_files)
    if not len(found):
        raise DataError(f"{HUB_PREFIX}{place} has no pictures")
    with write_folder(output) as partial:
        rows = [*_written(found, partial)]
        if found.has_captions and not _is_of_classes(found):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (partial / _METADATA).write_text("".join(lines), "utf-8")
    logger.info("%s: %d pictures of %s", output, len(found), place)
    return found


def _written(source: ImageSource, folder: Path) -> Iterator[dict[str, object]]:
    """Write the pictures; yield the row of each for the table of captions."""
    digits = max(6, len(str(len(source))))
    for number, (sample, file) in enumerate(zip(source.samples, source.files, strict=True)):
        content = file.read()
        path = folder / f"{number:0{digits}d}{suffix_of(content)}"
        if _is_of_classes(source):
            path = folder / _class_folder(sample) / path.name
            path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        yield {"file_name": path.name, **_texts(sample)}


def _texts(sample: Sample) -> dict[str, object]:
    if len(sample.captions) > 1:
        return {"captions": list(sample.captions)}
    return {"text": sample.caption}


def _is_of_classes(source: ImageSource) -> bool:
    """Return whether the captions are the names of classes."""
    if not source.class_names:
        return False
    first = source.samples[0]
    return first.class_id is not None and first.captions == (source.class_names[first.class_id],)


def _class_folder(sample: Sample) -> str:
    """Return the folder of a sample's class; DataError for a name that cannot be one."""
    name = sample.caption
    if name in ("", ".", "..") or os.sep in name or "\0" in name or name.startswith((".", "_")):
        raise DataError(f"class {name!r} cannot be the name of a folder; rename it in the set")
    return name
