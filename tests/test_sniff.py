"""What a file is is told by its bytes, never by its name, and told in one sentence."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save

from nsp.sniff import Sniffed, explain, sniff

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 1236544000\n"


def saved(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    if kind == "torch":
        torch.save({"a": torch.zeros(300)}, file, **options)
    elif kind == "numpy":
        np.save(file, np.zeros(3))
    elif kind == "picture":
        Image.new("RGB", (4, 4)).save(file, **options)
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/b.txt", "hello")
            archive.comment = b"a" * 60_000
    elif kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("name"))
    return file.getvalue()


def onnx_model() -> bytes:
    import onnx

    graph = onnx.helper.make_graph([], "g", [], [])
    whole: bytes = onnx.helper.make_model(graph).SerializeToString()
    return whole


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (POINTER.encode(), "lfs pointer"),
        (b"/annex/objects/SHA256E-s1236--00.safetensors\n", "annex pointer"),
        (b"# xet version 0\nfilesize = 123\n", "xet pointer"),
        (b"<!DOCTYPE html>\n<html><head>", "web page"),
        (b"\xef\xbb\xbf\r\n  <HTML lang=en>", "web page"),
        (b"<?xml version='1.0'?><!DOCTYPE html><html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "xml"),
        (b'{"error": "Repository not found"}', "json"),
        (b"[1, 2]", "json"),
        (b"Invalid username or password.", "text"),
        (save({"a": np.zeros(3)}), "safetensors"),
        (saved("torch"), "torch"),
        (saved("torch", _use_new_zipfile_serialization=False), "legacy torch"),
        (pickle.dumps({"a": 1}), "pickle"),
        (saved("zip"), "zip"),
        (saved("tar"), "archive"),
        (b"\x1f\x8b\x08\x00", "archive"),
        (saved("numpy"), "numpy"),
        (saved("picture", format="PNG"), "picture"),
        (saved("picture", format="JPEG"), "picture"),
        (saved("picture", format="WEBP"), "picture"),
        (b"PAR1" + bytes(20) + b"PAR1", "parquet"),
        (b"GGUF\x03\0\0\0", "gguf"),
        (onnx_model(), "onnx"),
        (bytes(600), "other"),
        (b"\xff" * 9, "other"),
    ],
)
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_bytes_tell_what_a_file_is_whatever_its_name(
    content: bytes, kind: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = sniff(path)
    assert (found.kind, found.size, found.is_cut) == (kind, len(content), False)
    assert str(path) in explain(path, expected="a file of weights")


@pytest.mark.parametrize("keep", [3, 100, 4000, 4500])
def test_a_cut_file_is_told_with_the_bytes_there_are_and_should_be(
    keep: int, tmp_path: Path
) -> None:
    for whole in (save({"a" * 300: np.zeros(600)}), saved("torch"), b"PAR1" + bytes(5000)):
        path = tmp_path / "file"
        path.write_bytes(whole[:keep])
        if keep > 3 and keep < len(whole):
            assert sniff(path).is_cut
            assert f"has {keep:,} bytes" in explain(path, expected="weights")
    whole = save({"a" * 300: np.zeros(600)})
    path.write_bytes(whole[:4500])
    assert f"has 4,500 bytes of {len(whole):,}" in explain(path, expected="weights")


def test_a_pointer_says_what_it_stands_for_and_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(POINTER)
    said = explain(tmp_path / "a", expected="weights")
    assert "stands for a file of 1,236,544,000 bytes; run: git lfs pull" in said
    (tmp_path / "a").write_text(POINTER[:60])
    assert "is a Git LFS pointer; run" in explain(tmp_path / "a", expected="weights")


def test_pipes_devices_and_folders_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    assert sniff(tmp_path / "pipe").kind == sniff(tmp_path / "zero").kind == "special"
    assert sniff(tmp_path).kind == "folder"
    assert sniff(tmp_path / "none").kind == sniff(tmp_path / "pipe/none").kind == "missing"
    assert sniff(tmp_path / "loop").kind == "link loop"
    assert sniff(Path("a\0b")).kind == "unreadable"


def test_a_file_that_may_not_be_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("a")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    said = explain(tmp_path / "a", expected="weights")
    assert "cannot be read (Permission denied); " in said
    assert "chmod" in said


def test_a_hostile_header_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", 99_000_000) + b"{" * 9000)
    assert sniff(path) == Sniffed(
        kind="safetensors", size=9008, whole_size=99_000_008, is_cut=True, is_at_least=True
    )
    path.write_bytes(struct.pack("<Q", 2**63) + b"{" * 9000)
    assert sniff(path).kind == "other"
    header = json.dumps({"a": {"data_offsets": [0, int("9" * 4000)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert not sniff(path).is_cut
