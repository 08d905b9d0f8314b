"""`nsp generate --npz` makes a set for `nsp evaluate`, alone or as one of several processes."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from nsp.cli import main
from nsp.data.image_files import read_metadata
from nsp.pipeline.orders import make_orders
from nsp.pipeline.pipeline import load_pipeline
from nsp.pipeline.results import to_uint8


def nsp(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def make(tiny_class_checkpoint: Path, tmp_path: Path):
    def run(*args: object) -> Result:
        model = ("--checkpoint", tiny_class_checkpoint, "--device", "cpu")
        return nsp("generate", *model, "--npz", tmp_path / "set", *args)

    return run


def test_a_set_has_the_wanted_number_of_pictures_and_settings(make, tmp_path: Path) -> None:
    done = make("--num-images", 5, "--top-k", 3, "--seed", 2, "--image-size-eval", 20)
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "set").glob("*.npz")
    assert done.stdout == f"{path}  5 images\n"
    assert "top_k-3" in path.name
    with np.load(path) as archive:
        assert archive["arr_0"].shape == (5, 20, 20, 3)
    described = json.loads(path.with_suffix(".json").read_text())
    assert (described["seed"], described["sampling"]["top_k"]) == (2, 3)
    again = make("--num-images", 5, "--top-k", 3, "--seed", 2, "--image-size-eval", 20, "--json")
    assert json.loads(again.stdout) == {
        "backend": "torch",
        "num_images": 5,
        "shard": [0, 1],
        "archive": str(path),
        "is_complete": True,
    }


def test_ranks_of_torchrun_are_shards(make, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        done = make("--num-images", 130, "--batch-size", 65, "--json")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert (found["shard"], found["is_complete"]) == ([rank, 2], rank == 0)
    one = make("--num-images", 2, "--seed", 9, "--shard", "0/1", "--json")
    assert json.loads(one.stdout)["shard"] == [0, 1]
    monkeypatch.setenv("RANK", "first")
    done = make("--num-images", 2)
    assert done.exit_code == 2
    assert "environment variable RANK is 'first', not a number" in done.stderr


@pytest.mark.parametrize("suffix", [".txt", ".npy"])
def test_labels_are_read_from_a_file(
    make, tiny_class_checkpoint: Path, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"labels{suffix}"
    if suffix == ".npy":
        np.save(path, np.array([7, 7]))
    else:
        path.write_text("7\n7\n")
    assert make("--num-images", 2, "--labels", path).exit_code == 0
    (file,) = (tmp_path / "set").glob("*.json")
    assert len(json.loads(file.read_text())["labels"]) == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--labels", "none.txt"), "neither random nor an existing file"),
        (("--labels", "words.txt"), "does not have one class number per line"),
        (("--labels", "two.txt", "--num-images", "3"), "2 labels are given for 3 pictures"),
        (("--labels", "large.txt", "--num-images", "1"), "label 0 is 10; classes of this model"),
        (("--labels", "float.npy"), "float.npy is float64 (2,); expected integers"),
        (("--shard", "4/4"), "shard 4/4 does not exist; the shards of 4 processes are 0/4 to 3/4"),
        (("--shard", "x"), "is not I/N"),
        (("--class-id", "3"), "--npz makes a set of pictures; --class or --class-id does not"),
        (("--prompt", "cat"), "--prompt does not belong to it"),
        (("--save-intermediates",), "--save-intermediates does not belong to it"),
        (("--num-images", "0"), "--num-images"),
    ],
)
def test_what_does_not_fit_is_one_line(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("cat\n")
    Path("two.txt").write_text("1\n2\n")
    Path("large.txt").write_text("10\n")
    np.save("float.npy", np.ones(2))
    done = make(*words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert not (tmp_path / "set").exists()


def test_options_of_sets_need_one(tiny_class_checkpoint: Path) -> None:
    model = ("generate", "--checkpoint", tiny_class_checkpoint, "--class-id", 1)
    for words in (("--labels", "random"), ("--shard", "0/2")):
        done = nsp(*model, *words)
        assert done.exit_code == 2
        assert f"{words[0]} belongs to sets of pictures; give --npz FOLDER too" in done.stderr


def test_single_pictures_are_resized_too(tiny_class_checkpoint: Path, tmp_path: Path) -> None:
    model = ("--checkpoint", tiny_class_checkpoint, "--device", "cpu", "--class-id", 1)
    files = ("--output-dir", tmp_path, "--format", "npz", "--no-sheet")
    assert nsp("generate", *model, *files, "--image-size-eval", 24).exit_code == 0
    pipeline = load_pipeline(tiny_class_checkpoint, device="cpu")
    image = pipeline.images(make_orders(pipeline.sampling, class_ids=[1]))
    with np.load(tmp_path / "images.npz") as archive:
        assert np.array_equal(archive["arr_0"], to_uint8(image, size_px=24))
    done = nsp("generate", *model, "--output-dir", tmp_path, "--image-size-eval", 24, "--json")
    assert done.exit_code == 0, done.output
    (made,) = json.loads(done.stdout)["images"]
    assert read_metadata(Path(made["path"]))["image_size_eval"] == "24"
    plain = nsp("generate", *model, "--output-dir", tmp_path, "--json")
    assert json.loads(plain.stdout)["images"][0]["ms"] is not None
