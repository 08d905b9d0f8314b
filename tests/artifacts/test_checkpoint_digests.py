"""A checkpoint draws what was written, or is refused in one line: digests of all its files."""

import json
import logging
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nsp.artifacts.checkpoint import CheckpointRecord, copy_in_half, read_checkpoint, write_digests
from nsp.cli import main
from nsp.console.inspection import describe_folder
from nsp.errors import CheckpointError, NspError
from nsp.pipeline.pipeline import load_pipeline
from tests.mutations import mutate
from tests.weights.weight_states import POINTER

DEMO = Path(__file__).parents[2] / "nsp/demo"
WEIGHTS = "predictor/model.safetensors"


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def load(folder: Path) -> None:
    load_pipeline(folder, device="cpu")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: flip(f / WEIGHTS), f"{WEIGHTS} changed since it was written (SHA-256)"),
        (lambda f: flip(f / "vae/model.safetensors", -4000), "vae/model.safetensors changed"),
        (lambda f: flip(f / "text_encoder/model.safetensors"), "text_encoder/model.safetensors"),
        (lambda f: edit(f / "text_encoder/config.json", lambda v: v.update(eos_token_id=3)),
         "text_encoder/config.json changed"),
        (lambda f: edit(f / "tokenizer/tokenizer_config.json", lambda v: v.update(x=3)),
         "tokenizer_config.json changed"),
        (lambda f: edit(f / "config.json", lambda v: v["config"]["vae"].update(norm_groups=2)),
         "config.json was changed since it was written"),
        (lambda f: edit(f / "config.json", lambda v: v.update(sampling={"guidance_scale": 6.0})),
         "config.json was changed"),
        (lambda f: edit(f / "config.json", lambda v: v.pop("files")), "config.json was changed"),
        (lambda f: edit(f / "config.json", lambda v: v.pop("digest")), "config.json was changed"),
        (lambda f: edit(f / "config.json", lambda v: v["files"].popitem()), "was changed"),
        (lambda f: (f / WEIGHTS).write_text(POINTER), "1,236,544,000 bytes; run: git lfs pull"),
        (lambda f: (f / WEIGHTS).write_text("<!doctype html>"), "is a web page"),
        (lambda f: (f / WEIGHTS).write_text("no weights"), 'is text ("no weights")'),
        (lambda f: os.truncate(f / WEIGHTS, 9000), "has 9,000 bytes of "),
        (lambda f: os.truncate(f / WEIGHTS, 0), "is empty"),
        (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "is not a regular file but a"),
        (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "is a folder"),
    ],
    ids=range(18),
)  # fmt: skip
def test_what_differs_from_what_was_written_is_refused(
    damage: Callable[[Path], object], said: str, copy: Path
) -> None:
    damage(copy)
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    assert said in str(caught.value)


def test_every_reader_refuses_a_changed_file(copy: Path, tmp_path: Path) -> None:
    flip(copy / WEIGHTS)
    for read in (
        lambda: read_checkpoint(copy).weights_hash(),
        lambda: read_checkpoint(copy).load(),
        lambda: copy_in_half(copy, tmp_path / "half"),
    ):
        with pytest.raises(CheckpointError, match="changed since it was written"):
            read()
    arguments = ["export", "--dry-run", "--checkpoint", str(copy), "--target", "onnxruntime"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "--no-verify" in refused.stderr
    assert CliRunner().invoke(main, [*arguments, "--no-verify"]).exit_code == 0


def test_what_was_changed_by_hand_can_be_taken_which_is_said(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copy / "config.json", lambda v: v.update(sampling={"guidance_scale": 6.0}))
    flip(copy / WEIGHTS)
    pipeline = load_pipeline(copy, device="cpu", verify=False)
    assert pipeline.sampling.guidance_scale == 6.0
    (line,) = [r.getMessage() for r in caplog.records if "not verified" in r.getMessage()]
    assert str(copy) in line
    write_digests(copy)
    load(copy)


def test_a_folder_written_before_digests_loads_which_is_logged_once(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = read_checkpoint(copy).weights_hash()
    edit(copy / "config.json", lambda v: (v.pop("files"), v.pop("digest")))
    with caplog.at_level(logging.INFO):
        load(copy)
    assert sum("before checkpoints had digests" in r.getMessage() for r in caplog.records) == 1
    assert read_checkpoint(copy).weights_hash() == whole


def test_reformatting_and_cards_change_nothing(copy: Path) -> None:
    whole = read_checkpoint(copy).weights_hash()
    edit(copy / "config.json", lambda v: None)
    (copy / "README.md").write_text("# A card")
    assert read_checkpoint(copy).weights_hash() == whole


def test_a_file_that_is_not_listed_changes_nothing(copy: Path) -> None:
    whole = read_checkpoint(copy).weights_hash()
    prompts = ["red apple", "a"]
    ids = load_pipeline(copy, device="cpu").tokenizer.encode(prompts)
    (copy / "tokenizer/special_tokens_map.json").write_text('{"pad_token": "a</w>"}')
    (copy / "tokenizer/added_tokens.json").write_text('{"x": 3}')
    (copy / "text_encoder/adapter_config.json").write_text("{}")
    (copy / "text_encoder/model.safetensors.index.json").write_text("{}")
    pipeline = load_pipeline(copy, device="cpu")
    assert (pipeline.tokenizer.encode(prompts) == ids).all()
    assert pipeline.model_hash == whole


@pytest.mark.parametrize("name", ["../vae/x", "/etc/passwd", "a/../b", "a//b", ".", "config.json"])
def test_a_listed_name_that_leads_outside_is_refused_before_it_is_read(
    name: str, copy: Path
) -> None:
    edit(copy / "config.json", lambda v: v["files"].update({name: "0" * 64}))
    with pytest.raises(CheckpointError, match="which is not inside it"):
        read_checkpoint(copy, verify=False)


@pytest.mark.parametrize("linked", [WEIGHTS, "vae"])
def test_a_link_in_the_folder_is_refused(linked: str, copy: Path, tmp_path: Path) -> None:
    (copy / linked).rename(tmp_path / "elsewhere")
    (copy / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is a link, .*cp -rL"):
        read_checkpoint(copy)


def test_no_permission_is_one_line(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(real: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(path: Any, *rest: Any, **options: Any) -> Any:
            if str(path) == str(copy / locked):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *rest, **options)

        return refuse

    monkeypatch.setattr(os, "open", denied(os.open))
    for locked in (WEIGHTS, "config.json"):
        with pytest.raises(CheckpointError, match=rf"{locked} cannot be read \(Permission denied"):
            load(copy)


@pytest.mark.parametrize("digests", [True, False])
def test_a_part_that_may_not_be_entered_is_one_line(
    digests: bool, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not digests:
        edit(copy / "config.json", lambda v: (v.pop("files"), v.pop("digest")))
    real = os.stat

    def refuse(path: Any, *rest: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(copy / "tokenizer/")):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(CheckpointError, match=r"tokenizer.*cannot be read \(Permission denied"):
        load(copy)


def test_a_folder_replaced_while_it_is_read_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = read_checkpoint(copy)
    assert record.digests
    edit(copy / "config.json", lambda v: v["notes"].update(steps=3))
    write_digests(copy)
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        record.load()


def test_inspecting_says_whether_the_files_are_those_written(copy: Path) -> None:
    assert describe_folder(copy)["digests"] == "match"
    flip(copy / WEIGHTS)
    assert "changed since it was written" in describe_folder(copy)["digests"]
    edit(copy / "config.json", lambda v: (v.pop("files"), v.pop("digest")))
    assert describe_folder(copy)["digests"].startswith("none")


def test_each_file_is_hashed_once_per_load(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nsp.artifacts.checkpoint

    hashed: list[Path] = []
    real = nsp.artifacts.checkpoint.file_sha256
    monkeypatch.setattr(
        nsp.artifacts.checkpoint, "file_sha256", lambda path: (hashed.append(path), real(path))[1]
    )
    load(copy)
    assert len(hashed) == len(set(hashed)) == 6


def test_the_bundled_model_has_its_digests_and_its_old_hash() -> None:
    record: CheckpointRecord = read_checkpoint(DEMO)
    assert record.files
    assert record.weights_hash().startswith("8a33e0ccdcdfa756")


@pytest.mark.parametrize(
    "change",
    [
        {"vae": {"channel_multipliers": [1, 10**6, 1]}},
        {"vae": {"channel_multipliers": [1] * 19}},
        {"predictor": {"mlp_ratio": 2.0**63}},
        {"predictor": {"mlp_ratio": 1e300}},
        {"predictor": {"depth": 2**20}},
        {"vae": {"num_res_blocks": 2**20}},
        {"patch_nums": [1, 2, 3, 100_000]},
        {"vae": {"vocab_size": 2**20, "latent_channels": 2**20}},
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_taken(
    change: dict[str, Any], copy: Path
) -> None:
    def apply(values: dict[str, Any]) -> None:
        for key, value in change.items():
            if isinstance(value, dict):
                values["config"][key].update(value)
            else:
                values["config"][key] = value

    edit(copy / "config.json", apply)
    with pytest.raises(NspError):
        load_pipeline(copy, device="cpu", verify=False)


def test_mutated_folders_draw_the_same_picture_or_are_refused(copy: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    whole = load_pipeline(copy, device="cpu").generate(prompts=["red apple"], seed=3).images
    said = []
    for number in range(40):
        folder = Path(shutil.copytree(copy, tmp_path / str(number)))
        what = mutate(folder, chance)
        try:
            found = load_pipeline(folder, device="cpu").generate(prompts=["red apple"], seed=3)
        except NspError as error:
            said.append(str(error))
        else:
            assert (found.images == whole).all(), what
        shutil.rmtree(folder)
    assert len(said) > 30
    assert not any("\n" in line for line in said)


def test_the_command_that_records_a_change_works_as_printed(copy: Path, tmp_path: Path) -> None:
    odd = tmp_path / "it's here"
    copy.rename(odd)
    edit(odd / "config.json", lambda values: values.update(notes={"mine": 1}))
    with pytest.raises(CheckpointError, match="record the change with: python -c ") as caught:
        read_checkpoint(odd)
    words = shlex.split(str(caught.value).partition("change with: ")[2])
    subprocess.run([sys.executable, *words[1:]], check=True)
    assert read_checkpoint(odd).notes == {"mine": 1}
