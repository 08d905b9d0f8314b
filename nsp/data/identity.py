"""Recognizes a set of pictures by its content, not its path, and describes what changed.

The samples of a training step follow from the seed, the step and the set: resumed on another set, a
run would continue with other pictures in another order. `ImageSource.identity()` and
`ShardSet.identity()` return a record for JSON, without any path; `describe_change` compares two.

    {"kind": "pictures", "num_samples": 2, "digest": "...", "samples": "...", "names": [...]}
    {"kind": "shards", "num_shards": 1, "digest": "...", "shards": [["a.tar", 10240, "sha256"]]}

`digest` decides whether two sets are the same, including their order. The rest serves to describe
changes and is left out of records that would be too large: `samples` has short digests of the name,
captions, class and picture of each sample.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsp.data.report import first
from nsp.data.samples import Sample

Identity = dict[str, Any]  # ready for JSON

_MOST_SAMPLES = 100_000  # samples with digests in a record, 32 letters each
_MOST_NAMES = 10_000
_MOST_SHARDS = 20_000
# The letters of a sample's digests, and where each ends: names are looked up, others compared.
_NAME, _CAPTIONS, _CLASS, _PICTURE = 12, 20, 24, 32
_NAMED = 5

Shard = tuple[str, int | None, str]  # file name, bytes, SHA-256 or ""


def digest_of(content: bytes) -> bytes:
    """Return the digest of a picture's file."""
    return hashlib.blake2b(content, digest_size=16).digest()


def _digest(value: object) -> bytes:
    return digest_of(json.dumps(value).encode())


def identity_of(samples: Sequence[Sample], digests: Sequence[bytes]) -> Identity:
    """Return the identity of listed samples; `digests` are those of their files."""
    whole, parts = hashlib.blake2b(digest_size=16), []
    for sample, digest in zip(samples, digests, strict=True):
        about = [_digest(part) for part in (sample.name, sample.captions, sample.class_id)]
        name, captions, number = (part.hex() for part in about)
        parts.append(name[:12] + captions[:8] + number[:4] + digest.hex()[:8])
        whole.update(b"".join(about) + digest)
    return {
        "kind": "pictures",
        "num_samples": len(samples),
        "digest": whole.hexdigest(),
        "samples": "".join(parts) if len(parts) <= _MOST_SAMPLES else None,
        "names": [each.name for each in samples] if len(samples) <= _MOST_NAMES else None,
    }


def identity_of_shards(shards: Sequence[Shard]) -> Identity:
    """Return the identity of shards: names, sizes and, if indexed, their SHA-256."""
    listed = [list(shard) for shard in shards]
    return {
        "kind": "shards",
        "num_shards": len(listed),
        "digest": _digest(listed).hex(),
        "shards": listed if len(listed) <= _MOST_SHARDS else None,
    }


def describe_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Return what changed from one record to another, in one clause; None when nothing did."""
    if (old.get("kind"), old.get("digest")) == (new.get("kind"), new.get("digest")):
        return None
    if old.get("kind") != new.get("kind"):
        words = {"pictures": "listed pictures", "shards": "a stream of shards"}
        then, now = (words.get(str(each.get("kind")), "something else") for each in (old, new))
        return f"{then} then, {now} now"
    of_pictures = new["kind"] == "pictures"
    one, count = ("picture", "num_samples") if of_pictures else ("shard", "num_shards")
    before, after = _items(old), _items(new)
    if before is None or after is None:
        if old.get(count) != new[count]:
            return f"{old.get(count)} {one}s then, {new[count]} now"
        return f"{one}s are others, or in another order"
    pairs = [(before[key], after[key]) for key in after if key in before]
    changes = [
        _change([after[key].name for key in after if key not in before], one, "more"),
        _change([before[key].name for key in before if key not in after], one, "gone"),
        _change([b.name for a, b in pairs if a.content != b.content], one, "replaced"),
        _change([b.name for a, b in pairs if a.captions != b.captions], "caption", "changed"),
        _change([b.name for a, b in pairs if a.label != b.label], "class", "changed"),
    ]
    return "; ".join(filter(None, changes)) or f"{one}s are in another order"


@dataclass(frozen=True)
class _Item:
    """What is known about a sample or shard."""

    key: str
    name: str | None
    content: str
    captions: str = ""
    label: str = ""


def _change(names: Sequence[str | None], what: str, how: str) -> str:
    """Return "2 pictures more: a.png, b.png", with the known names; empty if there are none."""
    if not names:
        return ""
    known = [name for name in names if name is not None]
    plural = "" if len(names) == 1 else "es" if what.endswith("s") else "s"
    return f"{len(names)} {what}{plural} {how}" + (f": {first(known, _NAMED)}" if known else "")


def _items(record: Mapping[str, Any]) -> dict[tuple[str, int], _Item] | None:
    """Return the samples or shards by name and number of earlier samples of that name."""
    items, seen = {}, Counter[str]()
    try:
        for item in _shards(record) if record["kind"] == "shards" else _samples(record):
            items[item.key, seen[item.key]] = item
            seen[item.key] += 1
    except (KeyError, TypeError, ValueError):  # missing, or not written by us
        return None
    return items


def _samples(record: Mapping[str, Any]) -> Iterator[_Item]:
    letters = record["samples"]
    parts = [letters[i : i + _PICTURE] for i in range(0, len(letters), _PICTURE)]
    names = record["names"] or [None] * len(parts)
    for part, name in zip(parts, names, strict=True):
        yield _Item(
            key=part[:_NAME],
            name=name,
            content=part[_CLASS:],
            captions=part[_NAME:_CAPTIONS],
            label=part[_CAPTIONS:_CLASS],
        )


def _shards(record: Mapping[str, Any]) -> Iterator[_Item]:
    for name, size, sha256 in record["shards"]:
        yield _Item(key=name, name=name, content=f"{size} {sha256}")
