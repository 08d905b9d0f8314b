import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nsp.data.dataset import ImageDataset
from nsp.data.sources import open_source
from nsp.errors import DataError
from tests.data.picture_files import encoded, write_files

datasets = pytest.importorskip("datasets", reason="needs the extra [datasets]")
PNG = encoded(".png")


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep what `datasets` caches inside the test, and its bars off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def _saved(path: Path, split: str | None = None, **columns: tuple[Any, list[Any]]) -> str:
    """Save a set of columns (feature, values) and return its spec."""
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    values = {name: column for name, (_, column) in columns.items()}
    datasets.Dataset.from_dict(values, features=features, split=split).save_to_disk(path)
    return f"hf:{path}"


def _pictures(count: int) -> tuple[Any, list[Any]]:
    rows = [{"bytes": encoded(".png", seed), "path": None} for seed in range(count)]
    return datasets.Image(), rows


def _texts(*values: str | None) -> tuple[Any, list[Any]]:
    return datasets.Value("string"), list(values)


def test_a_saved_set_gives_pictures_with_captions(tmp_path: Path) -> None:
    spec = _saved(tmp_path / "set", "train", photo=_pictures(2), words=_texts("a cat", "a dog"))
    source = open_source(spec)
    found = [(sample.name, sample.caption, sample.class_id) for sample in source.samples]
    assert found == [("train-0", "a cat", None), ("train-1", "a dog", None)]
    item = ImageDataset(source, 16, train=True, crop=False)[1]
    assert item["image"].shape == (3, 16, 16)
    assert source.files[1].read() == encoded(".png", 1)


def test_class_labels_are_captions_where_there_is_no_text(tmp_path: Path) -> None:
    label = (datasets.ClassLabel(names=["cat", "dog"]), [1, 0])
    source = open_source(_saved(tmp_path / "set", image=_pictures(2), label=label))
    assert source.class_names == ("cat", "dog")
    assert [(s.caption, s.class_id) for s in source.samples] == [("dog", 1), ("cat", 0)]
    both = _saved(tmp_path / "both", image=_pictures(2), label=label, text=_texts("x", "y"))
    assert [(s.caption, s.class_id) for s in open_source(both).samples] == [("x", 1), ("y", 0)]


def test_the_split_is_train_or_the_one_named(tmp_path: Path) -> None:
    parts = {}
    for name, caption in (("train", "seen"), ("test", "unseen")):
        spec = _saved(tmp_path / name, image=_pictures(1), text=_texts(caption))
        parts[name] = datasets.load_from_disk(spec.removeprefix("hf:"))
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert open_source(f"hf:{tmp_path / 'both'}").samples[0].caption == "seen"
    assert open_source(f"hf:{tmp_path / 'both'}:test").samples[0].caption == "unseen"
    with pytest.raises(DataError, match=r"no split val; choose .* from train, test"):
        open_source(f"hf:{tmp_path / 'both'}:val")


def test_a_folder_that_load_dataset_reads(tmp_path: Path) -> None:
    rows = '{"file_name": "a.png", "text": "a cat"}\n'
    write_files(tmp_path / "set", {"metadata.jsonl": rows, "a.png": PNG})
    (sample,) = open_source(f"hf:{tmp_path / 'set'}").samples
    assert (sample.name, sample.caption) == ("train-0", "a cat")


def test_bad_rows_are_named_and_left_out_only_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells = [{"bytes": PNG, "path": None}, {"bytes": b"no picture", "path": None}, None]
    cells += [{"bytes": PNG, "path": None}]
    texts = _texts("good", "bad", "none", None)
    spec = _saved(tmp_path / "set", image=(datasets.Image(), cells), text=texts)
    with pytest.raises(DataError, match="3 files cannot be used") as caught:
        open_source(spec)
    named = ["row-1 (not a", "row-2 (the row has no picture", "row-3 (no text in column text"]
    assert [what for what in named if what not in str(caught.value)] == []
    with caplog.at_level(logging.WARNING):
        source = open_source(spec, skip_bad_files=True)
    assert [sample.name for sample in source.samples] == ["row-0"]
    assert "left out row-1" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": "text"}, "no column of type Image"),
        ({"a": "image", "b": "image", "text": "text"}, r"2 columns \(a, b\) of type Image"),
        ({"image": "image", "a": "text", "b": "text"}, r"2 columns \(a, b\) may have the caption"),
        ({"image": "image", "a": "label", "b": "label"}, r"\(a, b\) of type ClassLabel"),
    ],
)
def test_a_column_that_is_not_clear_is_named(
    tmp_path: Path, columns: dict[str, str], message: str
) -> None:
    label = (datasets.ClassLabel(names=["x"]), [0])
    kinds = {"image": _pictures(1), "text": _texts("x"), "label": label}
    spec = _saved(tmp_path / "set", **{name: kinds[kind] for name, kind in columns.items()})
    with pytest.raises(DataError, match=message) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


def test_a_set_without_captions_says_so_and_can_be_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = (datasets.Value("int64"), [7, 8])
    source = open_source(_saved(tmp_path / "set", image=_pictures(2), width=numbers))
    assert [sample.captions for sample in source.samples] == [(), ()]
    assert not source.has_captions
    assert "so no captions; columns are image, width" in caplog.text


@pytest.mark.parametrize("name", ["caption", "captions", "text", "sentences"])
def test_a_column_of_lists_gives_several_captions(tmp_path: Path, name: str) -> None:
    lists = datasets.Sequence(datasets.Value("string"))
    cells = [["a cat", "one cat"], ["a dog"], ["a cow", None]]
    source = open_source(_saved(tmp_path / "set", image=_pictures(3), **{name: (lists, cells)}))
    captions = [sample.captions for sample in source.samples]
    assert captions == [("a cat", "one cat"), ("a dog",), ("a cow",)]


def test_of_several_texts_the_one_called_caption_is_taken(tmp_path: Path) -> None:
    spec = _saved(tmp_path / "s", image=_pictures(1), url=_texts("http"), caption=_texts("a cat"))
    assert open_source(spec).samples[0].caption == "a cat"


def test_heldout_rows_and_captions_never_train(tmp_path: Path) -> None:
    captions = _texts("red apple", "green apple", "Red  APPLE", "pear")
    spec = _saved(tmp_path / "set", image=_pictures(4), text=captions)
    write_files(tmp_path / "set", {"__heldout__": "name\tcaption\nrow-3\tred apple\n"})
    assert [sample.name for sample in open_source(spec).samples] == ["row-1"]
    assert len(open_source(spec, split="heldout")) == 3


def test_what_is_missing_offline_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\n(no network)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"hf:some/name: .*hub cannot be reached .*give a folder"):
        open_source("hf:some/name")
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"cannot load it .*save_to_disk"):
        open_source(f"hf:{tmp_path / 'empty'}")
