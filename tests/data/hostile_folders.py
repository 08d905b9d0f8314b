"""Makes folders of pictures as a hostile or careless hand would."""

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.data.picture_files import encoded, write_tar

PNG = encoded(".png", size=(8, 8))
NAMES = ["a", "b", "c/d", "c/e", "..x", "caf\udce9", "n\nl", "x" * 200, "\u202egnp", "é", "0"]
TEXTS: list[bytes] = [
    *(
        b"",
        b" ",
        b"a cat",
        b"caf\xe9",
        b"\xff\xfea\0",
        b"\0" * 9,
        b"x" * 2_000_000,
        b"\xef\xbb\xbfx",
    ),
    *(b"[" * 5000, b'{"caption": "x"}', b'{"captions": ["x", ""]}', b'{"caption": "\\ud800"}'),
    *(b"9" * 5000, b"a\nb\rc\x85d", b"name\tcaption\n", b"name\tcaption\na.png\tx\n", b"\t\t\n\t"),
]


def _claiming(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size that its pixels do not have."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _picture(rng: random.Random) -> bytes:
    content = rng.choice([PNG, PNG, encoded(".jpg"), encoded(".webp"), _claiming(60000, 60000)])
    kind = rng.randrange(6)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 2:
        mode = rng.choice(["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
        buffer = io.BytesIO()
        Image.new(mode, (9, 5)).save(buffer, "TIFF" if mode != "PA" else "PNG") if mode not in (
            "PA",
        ) else Image.new("LA", (9, 5)).save(buffer, "PNG")
        return buffer.getvalue()
    return content


def _table(rng: random.Random) -> tuple[str, bytes]:
    name = rng.choice(["metadata", "captions", "list", "c/metadata", "x.caption"])
    suffix = rng.choice(["jsonl", "json", "csv", "tsv", "parquet", "txt"])
    files = [*(f"{each}.png" for each in NAMES), "../a.png", "/etc/passwd", "c\\d.png", "\0", ""]
    values: list[object] = ["x", ["x", "y"], [], None, 7, {"a": "b"}, "\ud800", " ", ["x", None]]
    rows = [
        {
            rng.choice(["file_name", "image", "path", "name"]): rng.choice(files),
            rng.choice(["text", "caption", "prompt", "label"]): rng.choice(values),
        }
        for _ in range(rng.randrange(6))
    ]
    kind = rng.randrange(6)
    if kind == 0:
        text = json.dumps(rows)
    elif kind == 1:
        text = json.dumps({str(next(iter(row.values()))): list(row.values())[-1] for row in rows})
    elif kind == 2:
        found = [{"image_id": n, "caption": rng.choice(values)} for n in range(4)]
        images = [{"id": rng.choice([n, [n], None]), "file_name": files[n]} for n in range(4)]
        text = json.dumps({"images": images, "annotations": found})
    elif kind == 3:
        lines = [",".join(map(str, row.values())) for row in rows]
        text = "\n".join([rng.choice(["file_name,text", "a,b", "image|caption", ""]), *lines])
    else:
        text = "\n".join(map(json.dumps, rows))
    content = text.encode("utf-8", "surrogatepass")
    return f"{name}.{suffix}", rng.choice([content, content, content[:40], *TEXTS])


def make_hostile_folder(root: Path, seed: int) -> Path:
    """Write a folder that is a function of `seed`, and return it."""
    rng = random.Random(seed)
    files: dict[str, bytes] = {}
    for name in rng.sample(NAMES, rng.randrange(1, 6)):
        files[name + rng.choice([".png", ".jpg", ".PNG", ".tif", ".gif"])] = _picture(rng)
        for suffix in (".txt", ".caption", ".json", ".cls"):
            if rng.random() < (0.5 if suffix == ".txt" else 0.15):
                files[name + suffix] = rng.choice(TEXTS)
    for _ in range(rng.randrange(3)):
        name, content = _table(rng)
        files[name] = content
    if rng.random() < 0.2:
        files["__heldout__"] = rng.choice(TEXTS)
    if rng.random() < 0.2:
        files["index.json"] = rng.choice(TEXTS)
    if rng.random() < 0.2:
        members = {f"./{name}": content for name, content in files.items() if len(name) < 90}
        return _with_oddities(write_tar(root / "0.tar", dict(members)).parent, rng)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return _with_oddities(root, rng)


def _with_oddities(root: Path, rng: random.Random) -> Path:
    """Add links, pipes, devices and files that claim to be huge."""

    def sparse(path: Path) -> None:
        path.touch()
        os.truncate(path, 1 << 42)

    oddities: list[Callable[[Path], None]] = [
        lambda path: path.symlink_to("."),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(".."),
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
        sparse,
    ]
    suffixes = [".png", ".txt", ".jsonl", ".tar", "", ".json", ".csv", ".caption"]
    for number in range(rng.randrange(4)):
        rng.choice(oddities)(root / f"odd{number}{rng.choice(suffixes)}")
    return root
