import io
import logging
import os
import re
import tarfile
from pathlib import Path

import pytest

from nsp.data.pack import pack
from nsp.data.samples import Problem
from nsp.data.shards import RawSample, ShardReader, find_shards
from nsp.data.sources import EMOJI_TAR, open_source, survey
from nsp.errors import ConfigError, DataError
from tests.data.picture_files import encoded, write_files, write_tar

HELDOUT_TSV = EMOJI_TAR.with_name("emoji_heldout.tsv")
HELDOUT = [tuple(line.split("\t")) for line in HELDOUT_TSV.read_text("utf-8").splitlines()[1:]]
PNG = encoded(".png")


def _captions(spec: Path, **options: bool) -> dict[str, str]:
    source = open_source(spec, **options)
    return {sample.name: sample.caption for sample in source.samples}


# The split


def test_emoji_training_split_shows_no_heldout_codepoints_or_caption() -> None:
    train = open_source("emoji")
    names, captions = zip(*HELDOUT, strict=True)
    assert len(HELDOUT) == 200
    assert len(train) == 3789 - 200 - 5  # copies of held-out pictures
    assert not {sample.name for sample in train.samples} & set(names)
    assert not {sample.caption for sample in train.samples} & set(captions)


def test_no_training_picture_is_a_copy_of_a_heldout_one() -> None:
    """The font draws some of them alike for every skin tone: the snowboarder, for one."""
    heldout = open_source("emoji", split="heldout")
    pixels = {heldout.load(index).tobytes() for index in range(len(heldout))}
    train = open_source("emoji", split="train")
    assert not [s.name for i, s in enumerate(train.samples) if train.load(i).tobytes() in pixels]
    assert len(train) + len(heldout) < len(open_source("emoji", split="all"))


def test_emoji_heldout_split_is_exactly_the_list() -> None:
    heldout = open_source("emoji", split="heldout")
    assert {(sample.name, sample.caption) for sample in heldout.samples} == set(HELDOUT)
    assert heldout.load(0).size == (64, 64)


def test_a_heldout_caption_is_withheld_under_any_name_case_and_spacing(tmp_path: Path) -> None:
    files = {"a.png": PNG, "a.txt": "red apple", "b.png": PNG, "b.txt": "Red  Apple"}
    other = encoded(".png", seed=1)
    files |= {
        "c.png": other,
        "c.txt": "green apple",
        "__heldout__": "name\tcaption\na\tred apple\n",
    }
    for spec in (write_files(tmp_path / "folder", files), write_tar(tmp_path / "t.tar", files)):
        assert list(_captions(spec).values()) == ["green apple"]
        assert len(open_source(spec, split="heldout")) == 2
        assert len(open_source(spec, split="all")) == 3


def test_heldout_split_of_a_set_without_a_list_says_how_to_make_one(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": PNG, "a.txt": "x"})
    with pytest.raises(DataError, match="__heldout__"):
        open_source(tmp_path, split="heldout")
    with pytest.raises(ConfigError, match="train, heldout, all"):
        open_source(tmp_path, split="test")  # type: ignore[arg-type]


def test_a_heldout_list_that_names_nothing_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path, {"a.png": PNG, "a.txt": "x", "__heldout__": "name\tcaption\nzz\tqq\n"})
    assert len(open_source(tmp_path)) == 1
    assert "held out but not among the samples: zz" in caplog.text
    write_files(tmp_path, {"__heldout__": "name\tcaption\nno tab\n"})
    with pytest.raises(DataError, match=r"__heldout__, line 2"):
        open_source(tmp_path)


# The layouts


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": PNG, "a.txt": "a cat\n", "s/b.JPG": encoded(".jpg")})
    write_files(tmp_path, {"s/b.txt": "\ufeffein Hündchen"})
    assert _captions(tmp_path) == {"a.png": "a cat", "s/b.JPG": "ein Hündchen"}
    assert open_source(tmp_path).class_names == ()


def test_metadata_file_wins_over_captions_beside_the_pictures(tmp_path: Path) -> None:
    rows = '{"file_name": "s/a.png", "text": "from metadata"}\n\n'
    write_files(tmp_path, {"metadata.jsonl": rows, "s/a.png": PNG, "s/a.txt": "beside"})
    assert _captions(tmp_path) == {"s/a.png": "from metadata"}


def test_class_folders_give_ids_in_sorted_order_and_names_as_captions(tmp_path: Path) -> None:
    write_files(tmp_path, {"dog/1.png": PNG, "cat/2.webp": encoded(".webp"), ".git/x.png": "no"})
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert [(s.name, s.caption, s.class_id) for s in source.samples] == [
        ("cat/2.webp", "cat", 0),
        ("dog/1.png", "dog", 1),
    ]


def test_tar_and_folder_of_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"./a.png": PNG, "./a.txt": "first", "d/b.png": PNG})
    write_tar(tmp_path / "1.tar", {"c.txt": "second", "c.jpg": encoded(".jpg"), "c.json": "{}"})
    with pytest.raises(DataError, match=r"d/b \(the tar has no .txt with its"):
        open_source(tmp_path)
    assert _captions(tmp_path, skip_bad_files=True) == {"a": "first", "c": "second"}
    assert open_source(tmp_path / "1.tar").load(0).size == (24, 16)


@pytest.mark.parametrize(
    "files",
    [{}, {"notes.md": "x"}],
    ids=["empty", "no picture"],
)
def test_a_folder_without_a_layout_says_which_are_accepted(
    tmp_path: Path, files: dict[str, bytes | str]
) -> None:
    write_files(tmp_path, files)
    with pytest.raises(DataError, match=r"metadata.jsonl .* \.txt .* class, .* or \.tar"):
        open_source(tmp_path)


def test_a_path_that_is_no_source_says_what_is(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7000\n"
    files = {"a.png": PNG, "a.csv": "file_name,text\n", "lfs.tar": pointer, "empty.tar": ""}
    write_files(tmp_path, {**files, "cut.tar": EMOJI_TAR.read_bytes()[:5000]})
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken.tar").symlink_to("nowhere.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    for name, words in {
        "nowhere": "does not exist; a data set is needed here; accepted are 'emoji'",
        "a.png": "is a picture; a data set is needed here",
        "a.csv": 'is text ("file_name,text"); a data set is needed here',
        "loop": "is a link that leads back to itself",
        "broken.tar": "is a link to nowhere.tar, which does not exist",
        "pipe.tar": "is not a regular file but a pipe",
        "lfs.tar": "is a Git LFS pointer",
        "empty.tar": "is empty: 0 bytes; download or copy it again",
    }.items():
        with pytest.raises(DataError, match=re.escape(f"{name} {words}")):
            open_source(tmp_path / name)
    with pytest.raises(DataError, match=r"cut.tar: not a complete, uncompressed tar"):
        open_source(tmp_path / "cut.tar")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"manifest.json": "{}", "decoder/x/model.onnx": "x"}, "is an engine folder"),
        ({"config.json": "{}", "weights.safetensors": "x"}, "is a checkpoint folder"),
        ({"run.json": "{}", "log.txt": ""}, "is the folder of a training run"),
        ({"run.json": "{}", "tokenizer/samples/1.png": PNG}, "is the folder of a training run"),
        ({"about.json": "{}", "state.pt": "x"}, "is a saved step of a training run"),
        ({"a.safetensors": "x"}, "is a folder of weights files"),
    ],
)
def test_a_folder_of_something_else_is_told(
    files: dict[str, bytes | str], words: str, tmp_path: Path
) -> None:
    write_files(tmp_path / "given", files)
    with pytest.raises(DataError, match=f"given {words}.*; accepted are metadata.jsonl"):
        open_source(tmp_path / "given")


def test_pictures_are_a_set_whatever_else_lies_beside_them(tmp_path: Path) -> None:
    write_files(tmp_path, {"manifest.json": "{}", "config.json": "{}", "c/a.png": PNG})
    assert _captions(tmp_path) == {"c/a.png": "c"}


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        (["/etc/b.png", "/etc/b.txt"], "/etc/b (its name leads out of the tar; "),
        (["../b.png", "../b.txt"], "../b (its name leads out of the tar; "),
        (["c/../../b.png", "c/../../b.txt"], "../b (its name leads out of the tar; "),
        (["b.png", "b.txt", "b.png"], "b (two members end in .png)"),
        (["b.png", "b.txt", "./b.png"], "b (two members end in .png)"),
        (["b.png", "b.PNG", "b.txt"], "b (two members end in .png)"),
        (["b.png", "b.txt", "b.txt"], "b (two members end in .txt)"),
        (["b\0c.png", "b\0c.txt"], "b\0c (its name has a null character)"),
    ],
)
def test_names_that_no_tar_should_have_are_told_and_not_packed(
    members: list[str], problem: str, tmp_path: Path
) -> None:
    """Listed and streamed."""
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for number, name in enumerate(["a.png", "a.txt", *members]):
            content = encoded(".png", number) if name.lower().endswith("g") else b"a caption"
            info = tarfile.TarInfo("x" if "\0" in name else name)
            info.pax_headers = {"path": name} if "\0" in name else {}
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    found = survey(tmp_path / "0.tar")
    assert [entry.sample.name for entry in found.entries] == ["a"]
    assert [str(each)[: len(problem)] for each in found.problems] == [problem]
    pack(tmp_path / "0.tar", tmp_path / "packed", skip_bad_files=True)
    with tarfile.open(tmp_path / "packed/train-000000.tar") as archive:
        assert archive.getnames() == ["a.png", "a.txt"]
    read = list(ShardReader(find_shards(tmp_path)).read(str(tmp_path / "0.tar")))
    assert [each.key for each in read if isinstance(each, RawSample)] == ["a"]
    assert [problem in str(each) for each in read if isinstance(each, Problem)] == [True]


def test_a_tar_may_number_classes(tmp_path: Path) -> None:
    files = {"a.png": PNG, "a.txt": "cat", "a.cls": "2", "b.png": PNG, "b.txt": "dog", "b.cls": "0"}
    source = open_source(write_tar(tmp_path / "a.tar", files))
    assert [sample.class_id for sample in source.samples] == [2, 0]
    assert source.class_names == ("0", "1", "2")
    for wrong in ("x", "-1", "9999999999"):
        write_tar(tmp_path / "a.tar", files | {"b.cls": wrong})
        with pytest.raises(DataError, match=r"b \(its class is"):
            open_source(tmp_path / "a.tar")


def test_a_tar_cut_between_two_members_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", {"a.png": PNG, "a.txt": "a", "b.png": PNG, "b.txt": "b"})
    sample_bytes = 512 + -(-len(PNG) // 512) * 512 + 1024
    whole.write_bytes(whole.read_bytes()[:sample_bytes])
    with pytest.raises(DataError, match="cut before its end"):
        open_source(whole)


# Bad files


def _folder_of_bad_files(root: Path) -> Path:
    jpg = encoded(".jpg", size=(64, 64))
    files: dict[str, bytes | str] = {"good.png": PNG, "good.txt": "good"}
    files |= {"truncated.jpg": jpg[: len(jpg) // 2], "truncated.txt": "x"}
    files |= {"empty.png": b"", "empty.txt": "x"}
    files |= {"text.png": "not a picture", "text.txt": "x"}
    files |= {"broken.png": PNG[:60] + b"\0" * 40 + PNG[100:], "broken.txt": "x"}
    files |= {"blank.png": PNG, "blank.txt": " \n", "latin.png": PNG, "latin.txt": b"caf\xe9"}
    files |= {"alone.png": PNG, "orphan.txt": "x"}
    return write_files(root, files)


BAD = ["truncated.jpg", "empty.png", "text.png", "broken.png", "blank.png", "latin.png"]
BAD += ["alone.png", "orphan.txt"]


def test_every_bad_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_source(_folder_of_bad_files(tmp_path))
    message = str(caught.value)
    assert [name for name in BAD if name not in message] == []
    assert "8 files cannot be used" in message
    assert "good.png" not in message
    assert "--skip-bad-files" in message
    assert "\n" not in message


def test_skipped_files_are_logged_by_name_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        source = open_source(_folder_of_bad_files(tmp_path), skip_bad_files=True)
    assert [sample.name for sample in source.samples] == ["good.png"]
    assert [name for name in BAD if f"left out {name}" not in caplog.text] == []


def test_bad_metadata_rows_are_named(tmp_path: Path) -> None:
    rows = [
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "../outside.png", "text": "x"}',
        '{"file_name": "wordless.png"}',
        '{"file_name": "blank.png", "text": ""}',
        '{"text": "nameless"}',
        "{cut",
    ]
    root = tmp_path / "set"
    pictures = ("wordless.png", "blank.png", "unlisted.png", "../outside.png")
    write_files(root, {"metadata.jsonl": "\n".join(rows), **dict.fromkeys(pictures, PNG)})
    with pytest.raises(DataError) as caught:
        open_source(root)
    named = ["in metadata.jsonl but not in the folder (gone.png, ../outside.png)"]
    named += ["wordless.png (no text in metadata.jsonl: the row has file_name", "blank.png (its"]
    named += ["metadata.jsonl:5 (the row", "metadata.jsonl:6 (not JSON", "unlisted.png (no row"]
    assert [what for what in named if what not in str(caught.value)] == []


def test_a_picture_outside_the_class_folders_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, {"cat/1.png": PNG, "top.png": PNG, "cat/deep/2.png": PNG})
    with pytest.raises(DataError, match=r"2 files .*cat/deep/2.png \(not directly.*top.png \(not"):
        open_source(tmp_path)


def test_bad_files_are_counted_by_reason_and_the_first_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path, {f"c/{number:02}.png": b"" for number in range(43)})
    counted = r"43: the file is empty \(c/00.png, c/01.png, c/02.png and 40 more\)"
    with pytest.raises(DataError, match=f"43 files cannot be used: {counted};"):
        open_source(tmp_path)
    write_files(tmp_path, {"c/good.png": PNG})
    assert len(open_source(tmp_path, skip_bad_files=True)) == 1
    assert caplog.text.count("left out c/") == 20
    assert "left out 23 more: 23: the file is empty (c/20.png, " in caplog.text
    (tmp_path / "c/good.png").unlink()
    with pytest.raises(DataError, match="no usable picture"):
        open_source(tmp_path, skip_bad_files=True)


def test_files_that_play_no_part_are_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path, {"cat/1.png": PNG, "cat/notes.md": "x", ".DS_Store": "x"})
    assert len(open_source(tmp_path)) == 1
    assert "not used: cat/notes.md" in caplog.text
    assert ".DS_Store" not in caplog.text


def test_a_file_damaged_after_the_check_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, {"cat/1.png": PNG})
    source = open_source(tmp_path)
    (tmp_path / "cat/1.png").unlink()
    with pytest.raises(DataError, match=r"cat/1.png .*restore the file"):
        source.load(0)
