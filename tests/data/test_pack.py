import hashlib
import io
import tarfile
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from nsp.data.index import ShardIndex, read_index
from nsp.data.pack import pack
from nsp.data.sources import ImageSource, Split, open_source
from nsp.errors import ConfigError, DataError
from tests.data.picture_files import encoded, write_files, write_tar

PNG = encoded(".png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return twelve captioned pictures in two formats, two of them held out."""
    files: dict[str, bytes | str] = {"__heldout__": "name\tcaption\n3.png\tpicture 3\n"}
    for number in range(12):
        suffix = ".png" if number < 6 else ".jpg"
        files[f"{number}{suffix}"] = encoded(suffix, number)
        files[f"{number}.txt"] = f"picture {number}"
    files["11.txt"] = "Picture  3"
    return write_files(tmp_path / "folder", files)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _contents(source: ImageSource) -> set[tuple[str, bytes]]:
    files = zip(source.samples, source.files, strict=True)
    return {(sample.caption, file.read()) for sample, file in files}


def test_a_packed_source_gives_the_same_samples_and_splits(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "packed", samples_per_shard=5)
    for split in get_args(Split):
        before, after = (open_source(spec, split=split) for spec in (folder, tmp_path / "packed"))
        assert _contents(after) == _contents(before)
    heldout = open_source(tmp_path / "packed", split="heldout")
    assert sorted(sample.name for sample in heldout.samples) == ["11", "3"]


def test_the_index_is_true(folder: Path, tmp_path: Path) -> None:
    index = pack(folder, tmp_path / "packed", samples_per_shard=5)
    assert read_index(tmp_path / "packed") == index
    assert ShardIndex.from_dict(index.to_dict()) == index
    assert (index.num_samples, index.num_heldout) == (12, 2)
    assert [shard.num_samples for shard in index.shards] == [5, 5, 2]
    files = _bytes(tmp_path / "packed")
    assert list(files) == ["index.json", *(shard.file for shard in index.shards)]
    for shard in index.shards:
        assert shard.num_bytes == len(files[shard.file])
        assert shard.sha256 == hashlib.sha256(files[shard.file]).hexdigest()


def test_the_same_source_and_options_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pack(folder, tmp_path / name, samples_per_shard=5, seed=seed)
    first, again, other = (_bytes(tmp_path / name) for name in "abc")
    assert first == again
    assert first != other


def test_a_shard_ends_where_asked(folder: Path, tmp_path: Path) -> None:
    assert len(pack(folder, tmp_path / "one").shards) == 1
    small = pack(folder, tmp_path / "small", shard_size_mb=0.006)
    assert len(small.shards) > 4
    assert sum(shard.num_samples for shard in small.shards) == 12
    with pytest.raises(ConfigError, match="both given"):
        pack(folder, tmp_path / "x", samples_per_shard=1, shard_size_mb=1)


def test_classes_keep_their_numbers_and_names(tmp_path: Path) -> None:
    files = {"dog/1.png": encoded(".png", 1), "cat/1.png": PNG, "cat/2.png": encoded(".png", 2)}
    write_files(tmp_path / "classes", files)
    index = pack(tmp_path / "classes", tmp_path / "packed", samples_per_shard=2)
    assert index.class_names == ("cat", "dog")
    for spec in (tmp_path / "packed", tmp_path / "packed" / "train-000000.tar"):
        source = open_source(spec)
        assert source.class_names == ("cat", "dog")
        named = [(source.class_names[s.class_id or 0], s.caption) for s in source.samples]
        assert all(name == caption for name, caption in named)


def test_names_that_no_tar_or_reader_can_hold_get_another_key(tmp_path: Path) -> None:
    long = "é" * 70
    files: dict[str, bytes | str] = {}
    for name in ("v1.5/a.b", "v1.5/a_b", long, "x/" * 30 + "same"):
        files |= {f"{name}.png": encoded(".png", len(files)), f"{name}.txt": f"at {name}"}
    write_files(tmp_path / "odd", files)
    pack(tmp_path / "odd", tmp_path / "packed")
    source = open_source(tmp_path / "packed")
    assert {sample.caption for sample in source.samples} == {
        f"at {name.removesuffix('.png')}" for name in files if name.endswith(".png")
    }


def test_a_picture_that_only_its_row_names_keeps_its_place_in_the_shards(tmp_path: Path) -> None:
    rows = '{"file_name": ".hidden/1.png", "text": ["x", "y"]}\n{"file_name": "2.png", "text": "z"}'
    files: dict[str, bytes | str] = {".hidden/1.png": PNG, "2.png": encoded(".png", 2)}
    files["metadata.jsonl"] = rows
    write_files(tmp_path / "set", files)
    pack(tmp_path / "set", tmp_path / "packed")
    found = {sample.captions for sample in open_source(tmp_path / "packed").samples}
    assert found == {("x", "y"), ("z",)}


def test_readers_that_know_only_txt_see_one_caption_and_single_ones_have_no_json(
    tmp_path: Path,
) -> None:
    rows = '{"file_name": "1.png", "text": ["x", "y\\nz"]}\n{"file_name": "2.png", "text": "z"}'
    files: dict[str, bytes | str] = {"1.png": PNG, "2.png": encoded(".png", 2)}
    files["metadata.jsonl"] = rows
    write_files(tmp_path / "set", files)
    pack(tmp_path / "set", tmp_path / "packed")
    with tarfile.open(tmp_path / "packed/train-000000.tar") as archive:
        members = {m.name: archive.extractfile(m) for m in archive.getmembers()}
        texts = {n: f.read() for n, f in members.items() if f is not None and ".png" not in n}
    assert texts == {"1.txt": b"x", "1.json": b'{"captions": ["x", "y\\nz"]}', "2.txt": b"z"}


def test_pictures_are_copied_byte_for_byte_under_their_own_suffix(tmp_path: Path) -> None:
    jpeg = encoded(".jpg")
    bitmap = io.BytesIO()
    Image.new("L", (4, 4)).save(bitmap, "BMP")
    files = {"a.png": jpeg, "a.txt": "misnamed", "b.bmp": bitmap.getvalue(), "b.txt": "bitmap"}
    pack(write_files(tmp_path / "set", files), tmp_path / "packed")
    shard = (tmp_path / "packed" / "train-000000.tar").read_bytes()
    assert b"a.jpg" in shard
    assert jpeg in shard
    assert b"b.bmp" in shard


def test_nothing_is_left_of_a_pack_that_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(folder, {"bad.png": b"x", "bad.txt": "bad"})
    with pytest.raises(DataError, match=r"bad\.png"):
        pack(folder, tmp_path / "packed")
    assert pack(folder, tmp_path / "kept", skip_bad_files=True).num_samples == 12
    monkeypatch.setattr("nsp.data.pack.ShardRecord", None)
    with pytest.raises(TypeError):
        pack(folder, tmp_path / "packed", skip_bad_files=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "kept"]


def test_a_folder_in_use_is_left_alone(folder: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "used", {"thesis.txt": "x"})
    with pytest.raises(ConfigError, match="is not empty"):
        pack(folder, tmp_path / "used")
    assert (tmp_path / "used" / "thesis.txt").is_file()


def test_a_damaged_index_is_named_and_a_foreign_one_ignored(folder: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": PNG, "a.txt": "a"})
    (tmp_path / "index.json").write_text('{"format": "other"}')
    assert len(open_source(tmp_path / "a.tar")) == 1
    for text in ("{", '{"format": "nsp-shards"}', '{"format": "nsp-shards", "version": 2}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(DataError, match=r"index\.json is damaged .*pack again"):
            open_source(tmp_path / "a.tar")
