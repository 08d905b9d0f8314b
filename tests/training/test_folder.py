"""What a run folder promises: it knows its data, has no leftovers, and writes nothing outside."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.console.train_config import configure
from nsp.errors import CheckpointError, ConfigError, DataError
from nsp.family.recipe import RunConfig
from nsp.training import trainer
from nsp.training.checkpoints import CheckpointStore
from nsp.training.data_record import DataRecord
from nsp.training.folder import check_folder, locked, without_places
from nsp.training.leftovers import refuse_links, remove_leftovers
from nsp.training.run_pictures import open_pictures
from nsp.training.whole_run import train
from tests.training.pictures import write_pictures
from tests.training.test_checkpoints import store


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, and a run on it that stopped after its first phase."""
    folder = tmp_path_factory.mktemp("stopped")
    data = write_pictures(folder / "data")
    run = configure("smoke", None, data=str(data), steps=1)
    train(run, folder / "run", last_phase="tokenizer")
    return folder


@pytest.fixture
def place(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it elsewhere; the run still names its data where they were."""
    shutil.copytree(stopped, tmp_path / "place")
    return tmp_path / "place"


def resume(place: Path, *, accept: bool = False) -> None:
    """Do with the data in `place` what comes before the first step of a resumed run."""
    run = configure(None, place / "run", data=str(place / "data"))
    check_folder(place / "run", run, resume=True)
    data = open_pictures(run.data, skip_bad_files=False)
    record = DataRecord(place / "run", data, resume=True)
    record.check(accept_changed_data=accept)
    record.write({"tokenizer": 1})


def more(data: Path) -> None:
    Image.new("RGB", (16, 16)).save(data / "new.png")
    (data / "new.txt").write_text("new")


def gone(data: Path) -> None:
    (data / "3.png").unlink()
    (data / "3.txt").unlink()


CHANGES: list[tuple[Callable[[Path], Any], str]] = [
    (more, "1 picture more: new.png"),
    (gone, "1 picture gone: 3.png"),
    (lambda data: Image.new("RGB", (16, 16)).save(data / "3.png"), "1 picture replaced: 3.png"),
    (lambda data: (data / "3.txt").write_text("other"), "1 caption changed: 3.png"),
]


def test_data_that_moved_are_the_same_data(place: Path) -> None:
    assert str(place) not in (place / "run/data.json").read_text()
    resume(place)
    assert train(
        configure(None, place / "run", data=str(place / "data")), place / "run", resume=True
    ).finished


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_data_that_changed_are_refused_by_what_changed_or_accepted_and_recorded(
    place: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], Any],
    words: str,
) -> None:
    change(place / "data")
    with pytest.raises(ConfigError, match=f"{words}.*--accept-changed-data"):
        resume(place)
    with caplog.at_level(logging.WARNING):
        resume(place, accept=True)
    assert words in caplog.text
    record = json.loads((place / "run/data.json").read_text())
    assert record["accepted"] == [{"steps": {"tokenizer": 1}, "change": words}]
    resume(place)  # they are the run's data now


def test_a_run_of_before_records_its_data_at_its_first_resume(place: Path) -> None:
    (place / "run/data.json").unlink()
    with pytest.raises(ConfigError, match=r"data\.source"):  # nothing tells what they were
        resume(place)
    shutil.move(place / "data", place / "elsewhere")
    run = configure(None, place / "run")
    for name in ("start", "checkpoint"):
        path = place / "run" / name / "config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({n: values[n] for n in values if n not in ("files", "digest")}))
    train(run, place / "run", last_phase="tokenizer", resume=True)
    assert json.loads((place / "run/data.json").read_text())["train"]["num_samples"] == 12
    for name in ("start", "checkpoint"):
        assert read_checkpoint(place / "run" / name).files


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"train": 3, "accepted": []}', "\0" * 100),
        '{"train": {"kind": "pictures", "digest": "x", "names": [3]}, "accepted": []}',
        '{"train": {"kind": "pictures", "digest": "x"}, "held_out": [], "accepted": []}',
    ],
)
def test_a_damaged_record_of_data_is_named(place: Path, content: str) -> None:
    (place / "run/data.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"data\.json is damaged .* delete it"):
        resume(place)


def test_a_new_run_does_not_ask_what_an_abandoned_one_recorded(place: Path) -> None:
    run = configure("smoke", None, data=str(place / "data"))
    data = open_pictures(run.data, skip_bad_files=False)
    (place / "run/data.json").write_text("{")
    assert DataRecord(place / "run", data, resume=False).change is None


LEFT = {
    ".checkpoint.a1_b2c3d": "folder",
    ".start.00000000": "folder",
    ".checkpoint.zzzzzzzz.old": "folder",
    ".tokens.safetensors.12ab34cd.partial": "file",
    ".tokens.safetensors.4711.partial": "file",
    "tokenizer/checkpoints/.step00000002.abcdefgh": "folder",
    "tokenizer/checkpoints/.step00000001.gone": "folder",
    "tokenizer/samples/.step000001.png.12ab34cd.partial": "file",
}
KEPT = (".mine", ".checkpoint", "notes.partial", "tokenizer/.hidden.txt")


def test_the_holder_of_the_lock_removes_what_killed_trainings_left(place: Path) -> None:
    folder = place / "run"
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    for name, kind in LEFT.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if kind == "folder":
            path.mkdir()
            (path / "weights").write_bytes(b"1" * 100)
        else:
            path.write_bytes(b"1")
    for name in KEPT:
        (folder / name).write_text("mine")
    remove_leftovers(folder, configure(None, folder))
    after = {path.relative_to(folder) for path in folder.rglob("*")}
    assert after - before - {Path("tokenizer/samples")} == {Path(name) for name in KEPT}
    assert before <= after


def test_a_checkpoint_that_was_moved_aside_comes_back(place: Path) -> None:
    folder = place / "run"
    (folder / "checkpoint").rename(folder / ".checkpoint.a1b2c3d4.old")
    (folder / ".checkpoint.a1b2c3d4").mkdir()
    remove_leftovers(folder, configure(None, folder))
    assert (folder / "checkpoint/config.json").is_file()
    assert not list(folder.glob(".checkpoint*"))


def test_leftovers_that_are_links_lead_nowhere(place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine/file").write_text("mine")
    (place / "run/.checkpoint.a1b2c3d4").symlink_to(place / "mine")
    (place / "run/.x.12345678.partial").symlink_to(place / "mine/file")
    remove_leftovers(place / "run", configure(None, place / "run"))
    assert (place / "mine/file").read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    [
        *("run.json", "data.json", "checkpoint", "start", "tokens.safetensors", "tensorboard"),
        *("tokenizer", "predictor", "tokenizer/log.jsonl", "tokenizer/checkpoints"),
    ],
)
def test_nothing_in_a_run_folder_is_written_through_a_link(place: Path, name: str) -> None:
    path, mine = place / "run" / name, place / "mine"
    if path.exists():
        path.rename(mine)
    path.symlink_to(mine)
    run = configure("smoke", None, data=str(place / "data"), steps=1)
    with pytest.raises(ConfigError, match=f"{name} is a link"):
        refuse_links(place / "run", run)


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_a_lock_that_is_no_file_of_ours_is_refused_and_left_alone(place: Path, kind: str) -> None:
    lock, mine = place / "run/.lock", place / "mine"
    lock.unlink(missing_ok=True)
    if kind == "link":
        mine.write_text("mine")
    if kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(mine)
    with pytest.raises(OSError, match="lock"), locked(place / "run"):
        pass
    assert kind != "link" or mine.read_text() == "mine"
    assert kind != "dangling" or not mine.exists()


def test_a_lock_keeps_what_its_file_holds(place: Path) -> None:
    (place / "run/.lock").write_text("kept")
    with locked(place / "run"):
        pass
    assert (place / "run/.lock").read_text() == "kept"


def test_a_run_folder_may_be_reached_by_a_link(place: Path) -> None:
    (place / "link").symlink_to(place / "run")
    refuse_links(place / "link", configure(None, place / "link"))


@pytest.mark.parametrize("how", ["copied", "renamed", "told"])
def test_a_saved_step_is_held_to_the_name_of_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    made = store(tmp_path, [3.0, 2.0])
    false = tmp_path / "step00000009"
    if how == "renamed":
        (tmp_path / "step00000002").rename(false)
    else:
        shutil.copytree(tmp_path / "step00000002", false)
    if how == "told":  # about.json goes along with the name, the state does not
        about = json.loads((false / "about.json").read_text())
        (false / "about.json").write_text(json.dumps({**about, "step": 9}))
    with caplog.at_level(logging.WARNING):
        found = CheckpointStore(tmp_path, keep_last=2).load()
    assert found is not None
    assert found[0].step == found[1]["step"] == (1 if how == "renamed" else 2)
    assert "step00000009" in caplog.text
    made.save(3, {"step": 3}, config=found[0].config, loss=None)  # and it counts among none


def test_an_option_that_cannot_be_is_named_before_the_data_are_opened(
    config: RunConfig, tmp_path: Path
) -> None:
    run = dataclasses.replace(config, start_from=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="nowhere does not exist; a checkpoint folder"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_names_its_data_without_where_they_lay(stopped: Path) -> None:
    config = (stopped / "run/checkpoint/config.json").read_text()
    assert str(stopped) not in config
    assert json.loads(config)["notes"]["run"]["data"]["source"] == "data"
    places = {"a": ["hf:/home/me/set:train", "hf:me/set"], "b": "/mnt/x/", "c": "https://x/y"}
    named = {"a": ["hf:set:train", "hf:me/set"], "b": "x", "c": "https://x/y"}
    assert without_places(places) == named


def test_a_run_does_not_write_into_its_own_data(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    run = configure("smoke", None, data=str(data), steps=1)
    with pytest.raises(
        ConfigError, match=r"is inside the data folder .*choose another --output-dir"
    ):
        train(run, data / "run")
    assert not (data / "run").exists()


def test_data_that_is_not_where_it_was_is_asked_for(place: Path, tmp_path: Path) -> None:
    run = configure(None, place / "run", data=str(tmp_path / "moved"))
    with pytest.raises(ConfigError, match=r"does not exist .*; if it moved, give .* with --data"):
        train(run, place / "run", resume=True)


def test_a_run_without_a_saved_step_is_replaced_by_a_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = write_pictures(tmp_path / "data"), tmp_path / "run"

    def begin(steps: int) -> None:
        train(configure("smoke", None, data=str(data), steps=steps), folder, last_phase="tokenizer")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Phase, "_train_step", _fails)
        with pytest.raises(DataError):
            begin(2)
    assert (folder / "run.json").is_file()
    begin(1)
    assert json.loads((folder / "run.json").read_text())["phases"][0]["steps"] == 1
    kept = sorted(path for path in folder.rglob("*") if path.is_file())
    with pytest.raises(ConfigError, match="already has a run"):
        begin(2)
    shutil.rmtree(folder / "checkpoint")  # its saved steps are enough
    with pytest.raises(ConfigError, match="already has a run"):
        begin(2)
    assert [path for path in kept if not path.exists() and "checkpoint/" not in str(path)] == []


def test_a_run_whose_saved_steps_are_out_of_sight_is_not_replaced(tmp_path: Path) -> None:
    data, folder = write_pictures(tmp_path / "data"), tmp_path / "run"
    elsewhere = tmp_path / "steps"
    run = configure("smoke", None, data=str(data), steps=1, checkpoint_dir=str(elsewhere))
    train(run, folder, last_phase="tokenizer")
    shutil.rmtree(folder / "checkpoint")
    shutil.move(elsewhere, tmp_path / "unmounted")
    with pytest.raises(ConfigError, match="already has a run"):
        check_folder(folder, run, resume=False)


def _fails(*_: object) -> None:
    raise DataError("the pictures cannot be read")
