"""`nsp data download` writes a set of the hub to a folder that the readers read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nsp.cli import main
from nsp.data.sources import open_source
from tests.data.picture_files import encoded

datasets = pytest.importorskip("datasets", reason="needs the extra [datasets]")


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep what `datasets` caches inside the test, its bars off, and it from any network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def on_the_hub(monkeypatch: pytest.MonkeyPatch, **columns: tuple[Any, list[Any]]) -> None:
    """Let `load_dataset` find a set called owner/set with these columns (feature, values)."""
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    values = {name: column for name, (_, column) in columns.items()}
    table = datasets.Dataset.from_dict(values, features=features, split="train")

    def load(name: str) -> Any:
        if name != "owner/set":
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub (LocalEntryNotFoundError)")
        return datasets.DatasetDict({"train": table, "test": table.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load)


def pictures(*suffixes: str) -> tuple[Any, list[Any]]:
    rows = [{"bytes": encoded(suffix, seed), "path": None} for seed, suffix in enumerate(suffixes)]
    return datasets.Image(), rows


def download(*words: object) -> Result:
    return CliRunner().invoke(main, ["data", "download", *map(str, words)])


def test_captions_lie_in_a_table_beside_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = (datasets.List(datasets.Value("string")), [["a cat"], ["a dog", "ein Hund, groß"]])
    on_the_hub(monkeypatch, image=pictures(".png", ".jpg"), text=texts)
    result = download("owner/set", "--output", tmp_path / "set")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'set'}: 2 pictures\nnext: python train.py --data")
    source = open_source(tmp_path / "set")
    assert [each.captions for each in source.samples] == [("a cat",), ("a dog", "ein Hund, groß")]
    assert [each.name for each in source.samples] == ["000000.png", "000001.jpg"]
    assert source.files[1].read() == encoded(".jpg", 1)
    assert len(open_source(tmp_path / "set")) == 2
    one = download("owner/set", "--split", "test", "--output", tmp_path / "test")
    assert one.exit_code == 0, one.output
    assert len(open_source(tmp_path / "test")) == 1


def test_classes_become_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of CIFAR-10, whose columns are img and label."""
    label = (datasets.ClassLabel(names=["airplane", "cat"]), [1, 0, 1])
    on_the_hub(monkeypatch, img=pictures(".png", ".png", ".png"), label=label)
    assert download("owner/set", "--output", tmp_path / "set").exit_code == 0
    source = open_source(tmp_path / "set")
    assert source.class_names == ("airplane", "cat")
    assert [(each.caption, each.class_id) for each in source.samples] == [
        ("airplane", 0),
        ("cat", 1),
        ("cat", 1),
    ]


def test_a_set_without_captions_is_pictures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_hub(monkeypatch, image=pictures(".png"))
    assert download("owner/set", "--output", tmp_path / "set").exit_code == 0
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["000000.png"]
    assert not open_source(tmp_path / "set").has_captions


def test_without_network_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_hub(monkeypatch, image=pictures(".png"))
    result = download("owner/other", "--output", tmp_path / "set")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "the hub cannot be reached" in result.stderr
    assert "use a machine with network" in result.stderr
    assert not (tmp_path / "set").exists()


def test_a_folder_with_files_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_hub(monkeypatch, image=pictures(".png"))
    (tmp_path / "mine.txt").write_text("mine")
    result = download("owner/set", "--output", tmp_path)
    assert result.exit_code == 2
    assert "is not empty; give a new folder" in result.stderr


def test_a_class_that_cannot_be_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = (datasets.ClassLabel(names=["a/b"]), [0])
    on_the_hub(monkeypatch, image=pictures(".png"), label=label)
    result = download("owner/set", "--output", tmp_path / "set")
    assert "class 'a/b' cannot be the name of a folder" in result.stderr
