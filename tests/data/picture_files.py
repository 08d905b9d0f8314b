import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encoded(suffix: str, seed: int = 0, size: tuple[int, int] = (24, 16)) -> bytes:
    """Return a random RGB picture of (width, height) in the format of `suffix`."""
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    format_name = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[suffix]
    Image.fromarray(pixels).save(buffer, format_name)
    return buffer.getvalue()


def write_files(root: Path, files: dict[str, bytes | str]) -> Path:
    """Write each file under `root` and return `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def write_tar(path: Path, files: dict[str, bytes | str]) -> Path:
    """Write the files as an uncompressed tar and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            payload = content.encode() if isinstance(content, str) else content
            header = tarfile.TarInfo(name)
            header.size = len(payload)
            archive.addfile(header, io.BytesIO(payload))
    return path


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Return a folder of six captioned pictures."""
    files: dict[str, bytes | str] = {}
    for number in range(6):
        files[f"{number}.png"] = encoded(".png", number)
        files[f"{number}.txt"] = f"picture {number}\n"
    return write_files(tmp_path / "captioned", files)


def write_captioned(root: Path) -> Path:
    """Write five captioned 64 px pictures, b and e alike, c and d held out; return `root`."""
    files: dict[str, bytes | str] = {}
    captions = {"a": "red", "b": "green", "c": "blue", "d": "grey", "e": "dark green"}
    for seed, (name, caption) in enumerate(captions.items()):
        picture = encoded(".png", 1 if name == "e" else seed, (64, 64))
        files |= {f"{name}.png": picture, f"{name}.txt": caption}
    files["__heldout__"] = "name\tcaption\nc.png\tblue\nd.png\tgrey\n"
    return write_files(root, files)
