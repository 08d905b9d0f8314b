"""What a file is, by its first bytes and not by its suffix; needs neither torch nor NumPy.

The error of a parser ("header too large") does not help a user who has a Git LFS pointer, the web
page of a sign-in, or half a download. Every error about a file that cannot be used asks here first.
Only regular files are opened: a pipe would block, a device has no end.
"""

import errno
import io
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_HEAD = 512  # the first bytes, which show what a file is
_ZIP_TAIL = 22 + 0xFFFF  # the end record of a ZIP archive and the longest comment after it
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_SHOWN_TEXT = 60  # characters of a text that is quoted
_TORCH_LEGACY = bytes.fromhex(
    "80028a0a6cfc9c46f9206aa850192e"
)  # torch/serialization.py, MAGIC_NUMBER
_POINTER = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/")
_POINTER_SIZE = re.compile(rb"^size (\d{1,20})\s*$", re.MULTILINE)
_OFFSETS = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d{1,20}\s*,\s*(\d{1,20})\s*\]')
_ONNX = re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]")  # ir_version, another field
_PAGE = re.compile(rb"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)

# Kinds that nobody wants, and what to do about each.
_REMEDIES = {
    "missing": "give the path of an existing file",
    "folder": "give a file inside it",
    "special": "give a regular file",
    "link loop": "give the file itself",
    "unreadable": "make your user its owner, or allow reading it with chmod",
    "empty": "download or copy it again",
    "lfs pointer": "run: git lfs pull, or download the file itself",
    "annex pointer": "run: git annex get, or download the file itself",
    "xet pointer": "install git-xet and run: git xet install && git pull, or download the file",
    "web page": "download the file again, signed in where the site asks for it",
    "xml": "servers send such a page for an error: download the file again",
}
_WORDS = {
    "missing": "does not exist",
    "folder": "is a folder",
    "special": "is not a regular file but a pipe, socket or device",
    "link loop": "is a link that leads back to itself",
    "unreadable": "cannot be read",
    "empty": "is empty: 0 bytes",
    "lfs pointer": "is a Git LFS pointer",
    "annex pointer": "is a git-annex pointer, which stands for the file",
    "xet pointer": "is a Git Xet pointer, which stands for the file",
    "web page": "is a web page (HTML)",
    "xml": "is an XML page",
    "json": "is JSON",
    "text": "is text",
    "safetensors": "is a safetensors file",
    "torch": "is a torch file (torch.save)",
    "legacy torch": "is a torch file of the old format (before torch 1.6)",
    "pickle": "is a pickle that torch.save did not write",
    "numpy": "is a NumPy file",
    "zip": "is a ZIP archive",
    "archive": "is an archive (tar, or compressed)",
    "onnx": "is an ONNX model",
    "gguf": "is a GGUF file",
    "picture": "is a picture",
    "parquet": "is a Parquet table",
    "other": "is a file of an unknown kind",
}
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (_TORCH_LEGACY, "legacy torch"),
    (b"# xet version", "xet pointer"),
    (b"/annex/objects/", "annex pointer"),
    (b"\x93NUMPY", "numpy"),
    (b"GGUF", "gguf"),
    (b"PAR1", "parquet"),
    (b"\x89PNG\r\n", "picture"),
    (b"\xff\xd8\xff", "picture"),
    (b"GIF8", "picture"),
    (b"II*\0", "picture"),
    (b"MM\0*", "picture"),
    (b"\x1f\x8b", "archive"),  # gzip
    (b"BZh", "archive"),
    (b"\xfd7zXZ\0", "archive"),
    (b"\x28\xb5\x2f\xfd", "archive"),  # zstd
    (b"7z\xbc\xaf\x27\x1c", "archive"),
    (b"Rar!", "archive"),
)


@dataclass(frozen=True, kw_only=True)
class Sniffed:
    """What a file is: one of the kinds in `_WORDS`."""

    kind: str
    size: int = 0  # bytes it has
    whole_size: int | None = None  # bytes it should have, or that a pointer stands for
    is_cut: bool = False  # its end is missing
    is_at_least: bool = False  # `whole_size` is a lower bound: the header is cut too
    detail: str = ""  # the reason it cannot be read, or the first line of a text

    @property
    def is_spoilt(self) -> bool:
        """Return whether it is surely a mistake: a pointer, a page, empty, cut or unreadable."""
        return self.kind in _REMEDIES or self.is_cut

    @property
    def words(self) -> str:
        """Return what it is, as text after the file's name: "is a Git LFS pointer ..."."""
        words = _WORDS[self.kind]
        if self.kind == "lfs pointer" and self.whole_size is not None:
            return f"{words} that stands for a file of {self.whole_size:,} bytes"
        if self.is_cut:
            least = "at least " if self.is_at_least else ""
            of = "" if self.whole_size is None else f" of {least}{self.whole_size:,}"
            return f"{words} cut short: it has {self.size:,} bytes{of}, and its end is missing"
        return f"{words} ({self.detail})" if self.detail else words

    @property
    def remedy(self) -> str:
        """Return what to do about it; empty if that depends on what the user wanted."""
        return _REMEDIES.get(self.kind, "download or copy it again" if self.is_cut else "")


def sniff(path: Path) -> Sniffed:
    """Return what the file at `path` is; never raises.

    Reads 512 bytes, and the part that says how long the file should be: the header of a
    safetensors file, the end of a ZIP archive.
    """
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            return Sniffed(kind="folder")
        if not stat.S_ISREG(found.st_mode):
            return Sniffed(kind="special")
        # If the file is replaced by a pipe in between, we must not wait for it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                return Sniffed(kind="special")
            return _of_file(file, found.st_size)
    except (FileNotFoundError, NotADirectoryError):
        return Sniffed(kind="missing")
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ELOOP:
            return Sniffed(kind="link loop")
        # ValueError: a null character in the name
        return Sniffed(kind="unreadable", detail=getattr(error, "strerror", None) or str(error))


def sniff_bytes(content: bytes) -> Sniffed:
    """Return what the bytes of a file are, as `sniff` does."""
    return _of_file(io.BytesIO(content), len(content))


def explain(path: Path, *, expected: str, found: Sniffed | None = None) -> str:
    """Return one sentence about a file that is not the `expected` kind ("a file of weights").

    It says what the file is and what to do.
    """
    found = found or sniff(path)
    remedy = found.remedy or f"{expected} is needed here"
    return f"{path} {found.words}; {remedy}"


def _of_file(file: BinaryIO, size: int) -> Sniffed:
    """Return what an open file of `size` bytes is."""
    head = file.read(_HEAD)
    if not head:
        return Sniffed(kind="empty")
    if _POINTER.match(head):
        told = _POINTER_SIZE.search(head)
        whole = int(told[1]) if told else None
        return Sniffed(kind="lfs pointer", size=size, whole_size=whole)
    if head[8:9] == b"{" and 2 <= (length := struct.unpack_from("<Q", head)[0]) <= _MAX_HEADER:
        return _safetensors(file, size, length)
    if head.startswith(b"PK\x03\x04"):
        return _zip(file, size, head)
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None) or _other(head)
    if kind == "parquet":
        file.seek(max(0, size - 4))
        return Sniffed(kind=kind, size=size, is_cut=size < 12 or file.read(4) != b"PAR1")
    detail = _quoted(head) if kind in ("text", "json", "xml") else ""
    return Sniffed(kind=kind, size=size, detail=detail)


def _safetensors(file: BinaryIO, size: int, length: int) -> Sniffed:
    """Return a safetensors file, with the size that its header implies."""
    file.seek(8)
    header = file.read(length)
    ends = (int(match[1]) for match in _OFFSETS.finditer(header))
    whole = 8 + length + max(ends, default=0)
    return Sniffed(
        kind="safetensors",
        size=size,
        whole_size=whole,
        is_cut=size < whole,
        is_at_least=len(header) < length,
    )


def _zip(file: BinaryIO, size: int, head: bytes) -> Sniffed:
    """Return a ZIP archive (torch writes them too); without its end record it is cut."""
    length = struct.unpack_from("<H", head.ljust(30, b"\0"), 26)[0]
    first = head[30 : 30 + length]
    is_torch = b"/" in first and first.rpartition(b"/")[2] in (
        b"data.pkl",
        b"version",
        b"byteorder",
    )
    file.seek(max(0, size - _ZIP_TAIL))
    is_cut = b"PK\x05\x06" not in file.read(_ZIP_TAIL)
    return Sniffed(kind="torch" if is_torch else "zip", size=size, is_cut=is_cut)


def _other(head: bytes) -> str:
    """Return the kind of a file that has no signature at its start."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _PAGE.match(start):
        return "web page"
    if start.startswith((b"<?xml", b"<!--", b"<Error", b"<error")):
        return "web page" if _PAGE.search(start) else "xml"
    if head[257:262] == b"ustar":
        return "archive"
    if (head[:4], head[8:12]) == (b"RIFF", b"WEBP") or head[4:8] == b"ftyp":
        return "picture"
    if _ONNX.match(head):
        return "onnx"
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if not _is_text(head):
        return "other"
    return "json" if start[:1] in (b"{", b"[") else "text"


def _is_text(head: bytes) -> bool:
    """Return whether bytes are UTF-8 without control characters; the last one may be cut."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return not any(character < " " and character not in "\t\r\n\f" for character in text)


def _quoted(head: bytes) -> str:
    """Return the first line of a text in quotes."""
    text = head.decode("utf-8", "replace").strip("\ufeff \t\r\n\f")
    line = text.splitlines()[0] if text else ""
    return f'"{line[:_SHOWN_TEXT]}{"…" if len(line) > _SHOWN_TEXT else ""}"'
