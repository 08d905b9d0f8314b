"""Captions that exist are used, or the file that holds them is named: none is set aside."""

import json
import logging
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from nsp.data.captions import read_table
from nsp.data.sources import open_source, survey
from nsp.errors import DataError
from tests.data.picture_files import encoded, write_files, write_tar

PNG = encoded(".png", size=(8, 8))
Files = dict[str, bytes | str]


def _captions(root: Path) -> dict[str, tuple[str, ...]]:
    return {sample.name: sample.captions for sample in open_source(root).samples}


def _jsonl(*rows: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def _pngs(*names: str) -> Files:
    return dict.fromkeys(names, PNG)


COCO = {
    "info": {},
    "images": [{"id": 7, "file_name": "7.png"}, {"id": 8, "file_name": "8.png"}],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "a cat"},
        {"id": 2, "image_id": 7, "caption": "one cat"},
        {"id": 3, "image_id": 8, "caption": "a dog"},
        {"id": 4, "image_id": 9, "caption": "of nothing"},
    ],
}
TWO = {"a.png": ("a cat",), "b.png": ("a dog",)}
BELOW = {f"train/{name}": captions for name, captions in TWO.items()}
ROWS = ({"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "text": "a dog"})
HERE, THERE = _pngs("a.png", "b.png"), _pngs("train/a.png", "train/b.png")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"train/metadata.jsonl": _jsonl(*ROWS), **THERE}, BELOW, id="one down"),
        pytest.param(
            {
                "train/metadata.jsonl": _jsonl(*ROWS),
                "test/metadata.jsonl": _jsonl({"file_name": "c.png", "text": "a cow"}),
                **THERE,
                **_pngs("test/c.png"),
            },
            {**BELOW, "test/c.png": ("a cow",)},
            id="several",
        ),
        pytest.param(
            {"metadata.csv": 'file_name,text\nimages/a.png,"a, b"\nimages/b.png,c\n'}
            | _pngs("images/a.png", "images/b.png"),
            {"images/a.png": ("a, b",), "images/b.png": ("c",)},
            id="csv beside a folder",
        ),
        pytest.param(
            {"metadata.tsv": "file\tcaption\na\ta cat\nb\ta dog\n", **HERE}, TWO, id="tsv"
        ),
        pytest.param(
            {"captions.txt": "image,caption\na.png,a cat\nb.png,a dog\n"}
            | _pngs("Images/a.png", "Images/b.png"),
            {f"Images/{name}": captions for name, captions in TWO.items()},
            id="flickr",
        ),
        pytest.param(
            {"metadata.csv": "\ufefffile_name;prompt\r\na.png;a cat\r\nb.png;a dog\r\n", **HERE},
            TWO,
            id="semicolons, mark, CRLF",
        ),
        pytest.param({"metadata.jsonl": json.dumps(ROWS), **HERE}, TWO, id="array as jsonl"),
        pytest.param({"data.json": json.dumps(ROWS, indent=1), **HERE}, TWO, id="array"),
        pytest.param(
            {"captions.json": json.dumps({"a.png": "a cat", "b": ["a dog"]}), **HERE},
            TWO,
            id="mapping",
        ),
        pytest.param(
            {"meta_cap.json": json.dumps({"a": {"caption": "a cat"}, "b": {"caption": "a dog"}})}
            | HERE,
            TWO,
            id="mapping of objects",
        ),
        pytest.param(
            {"annotations/captions_val.json": json.dumps(COCO), **_pngs("val/7.png", "val/8.png")},
            {"val/7.png": ("a cat", "one cat"), "val/8.png": ("a dog",)},
            id="coco",
        ),
        pytest.param(
            {"10_dog/0.png": PNG, "10_dog/0.caption": "a dog", "5_cat/1.png": PNG}
            | {"5_cat/1.caption": "a cat"},
            {"10_dog/0.png": ("a dog",), "5_cat/1.png": ("a cat",)},
            id="kohya",
        ),
        pytest.param(
            {"0/1.png": PNG, "0/1.json": json.dumps({"caption": "a cat", "url": "x"})},
            {"0/1.png": ("a cat",)},
            id="img2dataset",
        ),
        pytest.param({"a.png": PNG, "a.TXT": "a cat"}, {"a.png": ("a cat",)}, id="upper case"),
        pytest.param(
            {"metadata.jsonl": _jsonl({"image": "sub\\a.png", "caption": "x"}), "sub/a.png": PNG},
            {"sub/a.png": ("x",)},
            id="backslashes",
        ),
        pytest.param(
            {"list.jsonl": _jsonl({"path": "/home/me/set/a.png", "text": "x"}), "set/a.png": PNG}
            | {"other.jsonl": _jsonl({"path": "set/a.png", "text": "x"})},
            {"set/a.png": ("x",)},
            id="another machine's paths",
        ),
    ],
)
def test_captions_are_read_as_people_have_them(
    tmp_path: Path, files: Files, expected: dict[str, tuple[str, ...]]
) -> None:
    assert _captions(write_files(tmp_path, files)) == expected
    assert not survey(tmp_path).class_names


def test_pictures_inside_parquet_are_a_data_set_of_datasets(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": b"a picture", "path": None}] * 2
    (tmp_path / "data").mkdir()
    table = pyarrow.table({"image": images, "text": ["a", "b"]})
    parquet.write_table(table, tmp_path / "data/train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=rf"give hf:{tmp_path}"):
        survey(tmp_path)


def test_parquet_beside_pictures_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [datasets]")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"file_name": ["a.png", "b.png"], "text": [["x", "y"], ["z"]]})
    parquet.write_table(table, write_files(tmp_path, HERE) / "metadata.parquet")
    assert _captions(tmp_path) == {"a.png": ("x", "y"), "b.png": ("z",)}
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match=r"metadata.parquet cannot be read: it is damaged"):
        open_source(tmp_path)


@pytest.mark.parametrize("form", ["list", "rows", "coco"])
def test_several_captions_of_a_picture_are_kept_in_order(tmp_path: Path, form: str) -> None:
    texts = ["a thing", "one thing", "a thing"]  # the same one twice is one
    rows = [{"file_name": "a.png", "text": text} for text in texts]
    if form == "list":
        rows = [{"file_name": "a.png", "text": texts}]  # type: ignore[dict-item]
    files: Files = {"metadata.jsonl": _jsonl(*rows)}
    if form == "coco":
        images = [{"id": 1, "file_name": "a.png"}]
        found = [{"image_id": 1, "caption": text} for text in texts]
        files = {"metadata.json": json.dumps({"images": images, "annotations": found})}
    write_files(tmp_path, {**files, "a.png": PNG})
    assert _captions(tmp_path) == {"a.png": ("a thing", "one thing")}


def test_a_picture_is_held_out_if_any_of_its_captions_is(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.png", "text": [f"thing {n}", f"one {n}"]} for n in range(3)]
    pictures = {f"{n}.png": encoded(".png", n) for n in range(3)}
    files: Files = {"metadata.jsonl": _jsonl(*rows), "__heldout__": "name\tcaption\nx\tOne  1\n"}
    write_files(tmp_path, {**files, **pictures})
    assert list(_captions(tmp_path)) == ["0.png", "2.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"captions.txt": "a cat\na dog\n", "c/a.png": PNG},
            r"captions.txt seems to contain captions",
        ),
        (
            {"metadata.jsonl": _jsonl(*ROWS), "images.zip": b"PK"},
            r"but it has images.zip; unpack that",
        ),
        ({"images.zip": b"PK"}, r"no picture, but images.zip; unpack it"),
        ({"data/train-0.parquet": b"PAR1", "README.md": ""}, r"give hf:.*set"),
        (
            {"train/n01/1.png": PNG, "train/n02/2.png": PNG, "val/n01/3.png": PNG},
            r"give the folder with the class folders: \S+set/train or \S+set/val",
        ),
        (
            {"images/a.png": PNG, "captions/a.txt": "a cat"},
            r"captions/a.txt \(1 such files\) .* move it to images/a.txt, or remove",
        ),
        ({"c/a.png": PNG, "c/a.png.txt": "a cat"}, r"move it to c/a.txt"),
        (
            {"x.csv": "file,text\na,x\n", "y.csv": "file,text\na,y\n", "c/a.png": PNG},
            r"x.csv and y.csv have different captions for c/a.png; keep one",
        ),
        ({"metadata.csv": "file_name,text\na,b,c\n", "a.png": PNG}, "more fields than the header"),
        ({"metadata.csv": "file_name,text\na,caf\xe9".encode("latin-1")} | HERE, "it is not UTF-8"),
    ],
)
def test_captions_that_cannot_be_read_are_named_with_what_to_do(
    tmp_path: Path, files: Files, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_source(write_files(tmp_path / "set", files))
    assert "\n" not in str(caught.value)


def test_sources_that_differ_are_named_and_the_first_of_them_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files: Files = {"a.png": PNG, "a.txt": "of txt", "a.caption": "of caption"}
    assert _captions(write_files(tmp_path, files)) == {"a.png": ("of txt",)}
    assert "1 pictures have different captions in different files, such as a.png" in caplog.text
    write_files(tmp_path, {"all.csv": "file,text\na,of csv\n"})
    assert _captions(tmp_path) == {"a.png": ("of txt",)}
    write_files(tmp_path, {"metadata.jsonl": _jsonl({"file_name": "a.png", "text": "of top"})})
    assert _captions(tmp_path) == {"a.png": ("of top",)}
    caplog.clear()
    same: Files = {"b.png": PNG, "b.txt": "x\n", "b.json": '{"caption": "x"}', "b.caption": "x"}
    assert _captions(write_files(tmp_path / "same", same)) == {"b.png": ("x",)}
    assert "differs" not in caplog.text


def test_what_is_no_caption_stays_where_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Class folders beside labels, boxes, settings and notes are class folders as before."""
    files: Files = {
        "cat/1.png": PNG,
        "dog/2.png": PNG,
        "labels.csv": "file,label\ncat/1.png,cat\n",
        "instances.json": json.dumps({**COCO, "annotations": [{"image_id": 7, "bbox": [1]}]}),
        "dataset_info.json": '{"description": "two pictures", "version": "1"}',
        "boxes/1.txt": "0 0.5 0.5 0.1 0.1\n",
        "README.txt": "two pictures",
        "cat/1.json": '{"camera": "x"}',
        "log.jsonl": '{"step": 1}\n',
    }
    source = open_source(write_files(tmp_path, files))
    assert source.class_names == ("cat", "dog")
    assert "not used: README.txt, boxes/1.txt, cat/1.json, dataset_info.json" in caplog.text


def test_tables_of_other_pictures_are_named_and_not_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """COCO's folder of annotations tells of train and val; one of them may be all one has."""
    other = {**COCO, "images": [{"id": 7, "file_name": "gone.png"}]}
    files: Files = {
        "annotations/captions_train.json": json.dumps(other),
        "annotations/captions_val.json": json.dumps(COCO),
        **_pngs("val/7.png", "val/8.png"),
    }
    assert len(_captions(write_files(tmp_path, files))) == 2
    assert "not used: annotations/captions_train.json" in caplog.text


def test_the_order_of_rows_and_of_names_stays(tmp_path: Path) -> None:
    rows = [{"file_name": name, "text": name} for name in ("b.png", "c.png", "a.png")]
    write_files(tmp_path, {"metadata.jsonl": _jsonl(*rows), **_pngs("a.png", "b.png", "c.png")})
    assert list(_captions(tmp_path)) == ["b.png", "c.png", "a.png"]
    (tmp_path / "metadata.jsonl").unlink()
    write_files(tmp_path, {f"{name}.txt": name for name in "abc"})
    write_files(tmp_path, {"z.csv": "file,text\nc,c\na,a\n"})
    assert list(_captions(tmp_path)) == ["a.png", "b.png", "c.png"]


def test_a_folder_without_any_caption_is_a_set_without_captions(tmp_path: Path) -> None:
    write_files(tmp_path, _pngs("a.png", "b.png"))
    source = open_source(tmp_path)
    assert [(s.name, s.captions, s.caption) for s in source.samples] == [
        *(("a.png", (), ""), ("b.png", (), ""))
    ]
    assert not source.has_captions
    write_files(tmp_path, {"a.txt": "x"})
    with pytest.raises(DataError, match=r"b.png \(no caption file with its name \(.txt\)\)"):
        open_source(tmp_path)


def test_a_tar_may_hold_its_captions_in_json_and_several_of_them(tmp_path: Path) -> None:
    files: Files = {"a.png": PNG, "a.json": json.dumps({"caption": "a cat", "sha": 1})}
    files |= {"b.png": PNG, "b.txt": "x", "b.json": json.dumps({"captions": ["x", "y"]})}
    files |= {"c.png": PNG, "c.txt": "z", "c.json": "[" * 5000, "all.json": "{}"}
    found = {"a": ("a cat",), "b": ("x", "y"), "c": ("z",)}
    assert _captions(write_tar(tmp_path / "0.tar", files)) == found
    long: Files = {"a.png": PNG, "a.txt": "x", "a.json": json.dumps({"exif": "x" * 1_200_000})}
    assert _captions(write_tar(tmp_path / "2.tar", long)) == {"a": ("x",)}
    assert _captions(write_files(tmp_path / "long", long)) == {"a.png": ("x",)}
    bare: Files = {"a.png": PNG, "b.png": PNG, "b.json": '{"width": 8}'}
    assert set(_captions(write_tar(tmp_path / "1.tar", bare)).values()) == {()}


def test_links_to_the_folder_itself_count_nothing_twice(tmp_path: Path) -> None:
    root = write_files(tmp_path / "set", {"a.png": PNG, "a.txt": "x"})
    for name in ("all", "again"):
        (root / name).symlink_to(".")
    assert list(_captions(root)) == ["a.png"]
    assert survey(root).unused == [
        *("again (a link to a folder that is already read)",),
        *("all (a link to a folder that is already read)",),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 5000, r"cannot be read: it is not JSON \(nested too deeply\)"),
        ('{"file_name": "a.png", "text": ' + "[" * 5000, "not JSON: nested too deeply"),
        ('{"file_name": "a.png", "text": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "its caption is not UTF-8"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', "but not in the folder"),
        ('{"file_name": "\\udce9.png", "text": "x"}', "but not in the folder"),
        ('{"file_name": "a.png", "text": 7}', "its text is neither a text nor a list of texts"),
        ('{"file_name": "a.png", "label": 7}', "the row has file_name, label; captions are read"),
        ('{"file_name": "a.png", "caption": null}', "its caption is empty"),
        ("7", "the row has no file_name"),
        ("a.png,x", "not JSON"),
    ],
)
def test_a_hostile_row_is_one_line(tmp_path: Path, line: str, reason: str) -> None:
    good = json.dumps(ROWS[1])
    write_files(tmp_path, {"metadata.jsonl": f"{line}\n{good}\n", **HERE})
    with pytest.raises(DataError, match=reason) as caught:
        open_source(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 900
    message.encode()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("\ud800", "its caption is not UTF-8"),
        ("\0", "its caption has a null character"),
        ("a\0 \0c\0a\0t\0", "its caption has a null character"),
        (" ", "its caption is empty"),
    ],
)
def test_one_bad_caption_of_several_leaves_the_picture_the_others(
    tmp_path: Path, bad: str, reason: str
) -> None:
    rows = [{"file_name": "a.png", "text": ["a cat", bad]}, {"file_name": "b.png", "text": bad}]
    found = survey(write_files(tmp_path, {"metadata.jsonl": _jsonl(*rows), **HERE}))
    assert [str(problem) for problem in found.problems] == [
        f"a.png (1 of its 2 captions: {reason})",
        f"b.png ({reason})",
    ]
    assert [entry.sample.captions for entry in found.entries] == [("a cat",)]
    with pytest.raises(DataError, match="2 files cannot be used"):
        open_source(tmp_path)


def test_utf_16_is_named_and_a_mark_and_carriage_returns_are_taken(tmp_path: Path) -> None:
    write_files(tmp_path, {"metadata.jsonl": _jsonl(*ROWS).encode("utf-16"), **HERE})
    with pytest.raises(DataError, match=r"metadata.jsonl cannot be read: it is UTF-16; save it"):
        open_source(tmp_path)
    text = _jsonl(*ROWS)
    for spelling in ("\ufeff" + text, text.replace("\n", "\r\n"), text.replace("\n", "\r")):
        write_files(tmp_path, {"metadata.jsonl": spelling})
        assert _captions(tmp_path) == TWO


def test_warnings_are_bounded_whatever_lies_in_the_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files: Files = {f"c/{n}.md": "x" for n in range(300)}
    rows: list[dict[str, Any]] = [{"k" * 99 + str(number): number} for number in range(300)]
    rows.append({"file_name": "c/a.png", "text": "x"})
    write_files(tmp_path, {**files, "c/a.png": PNG, "metadata.jsonl": _jsonl(*rows)})
    with caplog.at_level(logging.WARNING):
        assert len(open_source(tmp_path, skip_bad_files=True)) == 1
    assert sum(len(record.getMessage()) for record in caplog.records) < 12_000


@pytest.mark.parametrize("end", [b"", b"\r", b"\n"])
def test_a_long_table_takes_the_memory_of_its_rows(tmp_path: Path, end: bytes) -> None:
    """Of a hundred megabytes without a line, and a row after them."""
    path = write_files(tmp_path, HERE) / "metadata.jsonl"
    row = _jsonl(ROWS[0]).strip().encode()
    with path.open("wb") as file:
        file.write(row + end if end else b"")
        file.truncate(100 << 20)
        file.seek(0, os.SEEK_END)
        file.write(end + row if end else b"")
    tracemalloc.start()
    table = read_table(tmp_path, "metadata.jsonl")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table is not None
    assert len(table.rows) == (2 if end else 0)
    number = 2 if end else 1
    assert table.bad == [(f"metadata.jsonl:{number}", "not JSON: the line is too long")]
    assert most < 60 << 20


def test_a_long_line_of_a_csv_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    write_files(tmp_path, {"metadata.csv": "file_name,text\na.png,"})
    os.truncate(tmp_path / "metadata.csv", 100 << 20)
    tracemalloc.start()
    with pytest.raises(DataError, match="it has a line of more than 4,194,304 characters"):
        read_table(tmp_path, "metadata.csv")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 60 << 20


def test_a_table_has_a_bounded_length(tmp_path: Path) -> None:
    for name in ("metadata.jsonl", "captions.csv"):
        write_files(tmp_path, {name: "file_name,text\n"})
        os.truncate(tmp_path / name, 513 << 20)
        with pytest.raises(DataError, match="537,919,488 bytes; at most 536,870,912 are allowed"):
            read_table(tmp_path, name)
