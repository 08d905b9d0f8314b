"""What a wrong path promises: an error says what it is and what to type, whichever command it is.

Every kind of path that people have lies in one folder here, and each is given to every command.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file

from nsp import train
from nsp.artifacts.checkpoint import read_checkpoint
from nsp.cli import main
from nsp.errors import CheckpointError, EngineError
from nsp.paths import check_output, describe, wrong_path
from nsp.pipeline.pipeline import load_pipeline
from tests.artifacts.engine_folders import write_engines

KINDS = {
    "engines": "engines",
    "engines/manifest.json": "inside",
    "checkpoint": "checkpoint",
    "checkpoint/config.json": "inside",
    "runs/mine": "run",
    "runs/new": "run",
    "runs": "folder",
    "around": "around",
    "stopped": "unfinished export",
    "weights.pth": "weights",
    "weights.bin": "weights",
    "weights": "weights folder",
    "hub": "hub model",
    "hub/unet": "hub model",
    "parquet": "parquet",
    "shards": "shards",
    "pictures": "pictures",
    "picture.png": "picture",
    "prompts.txt": "text",
    "data.tar": "archive",
    "pointer.safetensors": "spoilt",
    "empty": "empty",
    "empty.pth": "spoilt",
    "nowhere": "missing",
    "picture.png/below": "missing",
    "broken": "broken link",
    "loop": "link loop",
    "pipe": "spoilt",
    "n" * 300: "missing",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    root = tmp_path_factory.mktemp("paths") / "it's here"
    root.mkdir()
    write_engines(root / "engines")
    shutil.copytree(tiny_checkpoint, root / "checkpoint")
    for folder in ("runs/mine", "runs/new", "empty", "weights", "hub/unet", "shards", "around"):
        (root / folder).mkdir(parents=True)
    for folder in ("parquet/data", "pictures/cats", "stopped/.export"):
        (root / folder).mkdir(parents=True)
    for run in ("mine", "new"):
        (root / "runs" / run / "run.json").write_text("{}")
    for folder in ("runs/mine/checkpoint", "around/model"):
        (root / folder).symlink_to(root / "checkpoint")
    save_file({}, root / "weights.pth")  # whatever its suffix
    import torch

    torch.save({}, root / "weights.bin")
    save_file({}, root / "weights/model.safetensors")
    (root / "hub/model_index.json").write_text("{}")
    (root / "hub/unet/config.json").write_text('{"_class_name": "UNet2DModel"}')
    (root / "parquet/data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    (root / "shards/000.tar").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(root / "picture.png")
    shutil.copy(root / "picture.png", root / "pictures/cats/1.png")
    (root / "prompts.txt").write_text("a red apple\n")
    import tarfile

    with tarfile.open(root / "data.tar", "w") as archive:
        archive.add(root / "picture.png", "1.png")
    (root / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (root / "empty.pth").touch()
    (root / "broken").symlink_to(root / "nothing")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_every_kind_of_path_is_told(place: Path, name: str, kind: str) -> None:
    found = describe(place / name)
    assert (found.kind, found.path) == (kind, place / name)


def test_a_folder_that_may_not_be_read_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    assert (
        describe(place / "engines").words == "is a folder that cannot be read (Permission denied)"
    )
    monkeypatch.setattr(os, "stat", refuse)
    assert describe(place / "engines").words == "cannot be read (Permission denied)"


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000, b"{}"])
def test_a_damaged_configuration_is_taken_for_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert describe(tmp_path).kind == "checkpoint"


COMMANDS = {
    "generate --checkpoint": ("generate", "--class-id", "1", "--output-dir", "OUT", "--checkpoint"),
    "generate --engine-dir": ("generate", "--class-id", "1", "--output-dir", "OUT", "--engine-dir"),
    "inspect": ("inspect",),
    "verify": ("verify",),
    "bench": ("bench", "--output-dir", "OUT", "--engine-dir"),
    "export": ("export", "--engine-dir", "OUT", "--checkpoint"),
    "data cache": ("data", "cache", "emoji", "--output", "OUT", "--checkpoint"),
}
SAID = [
    ("generate --checkpoint", "engines", "is an engine folder; use: --engine-dir 'PLACE/engines'"),
    ("data cache", "engines", "is an engine folder; a checkpoint folder (with config.json) is"),
    ("export", "engines", "has engines, the result of an export; give the checkpoint"),
    ("generate --checkpoint", "runs/mine", "training run; use: 'PLACE/runs/mine/checkpoint'"),
    ("generate --checkpoint", "runs/new", "that has no checkpoint yet; continue it with: python"),
    (
        "generate --checkpoint",
        "around",
        "contains a checkpoint folder, model/; use: 'PLACE/around",
    ),
    ("generate --checkpoint", "weights.pth", "is a weights file (safetensors); use: nsp convert"),
    (
        "generate --checkpoint",
        "checkpoint/config.json",
        "a file of a checkpoint folder; use: 'PLACE/",
    ),
    (
        "generate --engine-dir",
        "checkpoint",
        "checkpoint folder; use: --checkpoint 'PLACE/checkpoint'",
    ),
    ("generate --engine-dir", "runs/mine", "use: --checkpoint 'PLACE/runs/mine/checkpoint'"),
    ("generate --engine-dir", "weights.bin", "is a weights file (torch.save); use: nsp convert"),
    (
        "generate --engine-dir",
        "engines/manifest.json",
        "a file of an engine folder; use: 'PLACE/eng",
    ),
    ("generate --engine-dir", "hub", "is a model folder of Hugging Face; an engine folder"),
    ("generate --engine-dir", "broken", "is a link to PLACE/nothing, which does not exist"),
    ("generate --engine-dir", "pipe", "is not a regular file but a pipe"),
    ("inspect", "weights.pth", "is a weights file (safetensors); use: nsp convert"),
    ("inspect", "runs/mine", "training run; use: 'PLACE/runs/mine/checkpoint'"),
    ("inspect", "pointer.safetensors", "is a Git LFS pointer; run: git lfs pull"),
    ("inspect", "stopped", "the export was not finished"),
    ("inspect", "parquet", "contains parquet files"),
    (
        "verify",
        "checkpoint",
        "make engines from it with: nsp export --checkpoint 'PLACE/checkpoint'",
    ),
    ("verify", "picture.png", "is a picture; an engine folder (with manifest.json) is needed"),
    (
        "bench",
        "runs/mine",
        "make engines from it with: nsp export --checkpoint 'PLACE/runs/mine/che",
    ),
    ("bench", "prompts.txt", 'is text ("a red apple"); an engine folder'),
    ("export", "hub/unet", "is a model folder of Hugging Face"),
    ("export", "empty.pth", "is empty: 0 bytes; download or copy it again"),
]


@pytest.mark.parametrize(("command", "name", "said"), SAID)
def test_a_command_says_what_a_path_is_and_what_to_type(
    place: Path, tmp_path: Path, command: str, name: str, said: str
) -> None:
    arguments = [each.replace("OUT", str(tmp_path / "out")) for each in COMMANDS[command]]
    result = CliRunner().invoke(main, [*arguments, str(place / name)])
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    shown = str(place).replace("'", "'\"'\"'") if "'PLACE" in said else str(place)
    assert said.replace("PLACE", shown) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("engines", "checkpoint")])
def test_no_path_ends_in_a_traceback_or_in_more_than_a_line(
    place: Path, tmp_path: Path, command: str, name: str
) -> None:
    arguments = [each.replace("OUT", str(tmp_path / "out")) for each in COMMANDS[command]]
    result = CliRunner().invoke(main, [*arguments, str(place / name)])
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert not (tmp_path / "out").exists()


def test_python_is_told_the_same(place: Path) -> None:
    with pytest.raises(EngineError, match="is a weights file"):
        load_pipeline(place / "weights.bin")
    with pytest.raises(CheckpointError, match="is a model folder of Hugging Face"):
        load_pipeline(place / "hub/unet")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("engines", "is an engine folder; a checkpoint folder"),
        ("runs/mine", "runs/mine/checkpoint"),
        ("weights.pth", "use: nsp convert"),
    ],
)
def test_training_says_what_it_cannot_start_from(
    place: Path, tmp_path: Path, name: str, said: str
) -> None:
    options = ["--preset", "smoke", "--output-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(train.main, [*options, "--start-from", str(place / name)])
    assert result.exit_code == 1
    assert said in result.stderr.splitlines()[-1]


def test_a_folder_of_parquet_files_is_read_by_its_other_name(place: Path) -> None:
    assert wrong_path(place / "parquet", "data").endswith(
        "contains parquet files; use: hf:" + "'" + str(place).replace("'", "'\"'\"'") + "/parquet'"
    )


@pytest.mark.parametrize("name", ["weights.pth", "weights.pth/below", "broken", "loop", "pipe"])
def test_an_output_folder_that_cannot_be_one_is_refused_before_anything_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("nsp.pipeline.pipeline.load_pipeline", load)
    options = ("--engine-dir", str(place / "engines"), "--class-id", "1")
    result = CliRunner().invoke(main, ["generate", *options, "--output-dir", str(place / name)])
    assert result.exit_code == 1
    assert "choose another --output-dir" in result.stderr
    with pytest.raises(NotADirectoryError):
        check_output(place / name)
    check_output(place / "new/one")
    check_output(Path("relative/new"))


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _broken(path: Path) -> None:
    path.symlink_to("/nowhere/config.json")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            _pipe,
            "has a config.json that is not a regular file but a pipe, socket or device; give a",
        ),
        (_loop, "has a config.json that is a link that leads back to itself; copy the folder"),
        (_broken, "has a config.json that is a link to /nowhere/config.json, which does not exist"),
    ],
)
def test_a_configuration_that_is_no_file_is_named_not_the_weights_beside_it(
    make: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    make(tmp_path / "config.json")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert said in str(caught.value)
    assert "nsp convert" not in str(caught.value)


def test_a_link_loop_is_no_matter_of_permissions(place: Path) -> None:
    with pytest.raises(CheckpointError, match="is a link that leads back to itself; a ch") as told:
        read_checkpoint(place / "loop")
    assert "chmod" not in str(told.value)
