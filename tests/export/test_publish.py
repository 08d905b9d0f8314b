"""Publishing: readers get one export or the other, and nothing else is ever touched."""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from nsp.artifacts import engine_files
from nsp.artifacts import engines as engine_dir
from nsp.artifacts.engines import open_engine_dir
from nsp.artifacts.manifest import (
    PRECISION_DTYPES,
    SCHEMA,
    Manifest,
    Precision,
    Variant,
    read_manifest,
)
from nsp.backends.onnxruntime.ort_backend import OnnxRuntimeBackend
from nsp.errors import ConfigError, EngineError, ExportError
from nsp.export.store import EngineStore, with_variant
from tests.artifacts.engine_folders import CLASSES, engine_file
from tests.backends.onnx_stages import write_hollow_model
from tests.models import stages_io

RED, BLUE, GREEN = "red", "blue", "green"


def build(store: EngineStore, model: str, precision: Precision = "fp32") -> Manifest:
    """Lay hollow engines, every one of which names its model, in the staging folder."""
    stages = {}
    for stage, io in stages_io(CLASSES, "present", PRECISION_DTYPES[precision]).items():
        with store.new_folder() as folder:
            path = write_hollow_model(folder / "model.onnx", io)
            graph = onnx.load(path)
            graph.doc_string = model
            onnx.save(graph, path)
            files = store.finish(folder, f"{stage}/onnxruntime-{precision}-")
        stages[stage] = (
            Variant(
                backend="onnxruntime",
                precision=precision,
                kv_layout="present",
                opset=18,
                io=io.to_dict(),
                files=files,
                fingerprint=f"{model} {stage} {precision}",
            ),
        )
    return Manifest(
        schema=SCHEMA,
        family="var",
        config=CLASSES.to_dict(),
        model_hash=model,
        source="tests",
        stages=stages,
    )


def publish(folder: Path, model: str, precision: Precision = "fp32") -> Manifest:
    store = EngineStore(folder)
    with store.lock():
        manifest = build(store, model, precision)
        for stage, variants in store.kept(manifest).items():
            for variant in variants:
                manifest = with_variant(manifest, stage, variant)
        store.publish(manifest)
    return manifest


def loaded_models(folder: Path) -> set[str]:
    """Return which models the manifest and the loaded stages are of."""
    opened = open_engine_dir(folder)
    assert isinstance(opened.backend, OnnxRuntimeBackend)
    opened.backend.wait()
    sessions = (session.result() for session in opened.backend._sessions.values())
    return {opened.manifest.model_hash, *(s.get_modelmeta().description for s in sessions)}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    publish(tmp_path / "engines", RED)
    return tmp_path / "engines"


def test_readers_never_mix_two_models_nor_are_refused_while_others_are_published(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = OnnxRuntimeBackend._load

    def slow(self: OnnxRuntimeBackend, stage: str, path: Path) -> object:
        time.sleep(0.02)  # sessions load in the background, several publishes long
        return load(self, stage, path)

    monkeypatch.setattr(OnnxRuntimeBackend, "_load", slow)
    ended = threading.Event()
    failures: list[BaseException] = []

    def keep_publishing() -> None:
        try:
            while not ended.is_set():
                for model in (BLUE, GREEN, RED):
                    publish(engines, model)
        except BaseException as error:
            failures.append(error)

    publisher = threading.Thread(target=keep_publishing)
    publisher.start()
    try:
        seen: list[set[str]] = []
        patience = time.monotonic() + 30  # a busy machine may begin to publish late
        while len(seen) < 12 or (len(set().union(*seen)) < 2 and time.monotonic() < patience):
            seen.append(loaded_models(engines))
    finally:
        ended.set()
        publisher.join()
    assert not failures
    assert all(len(models) == 1 for models in seen), seen
    assert len(set().union(*seen)) > 1


def test_without_locks_a_reader_reads_the_manifest_again(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = engine_dir.choose_variants
    reads = []

    def replaced_meanwhile(*args: object, **settings: object) -> object:
        reads.append(len(reads))
        if len(reads) < 3:
            shutil.rmtree(engines / "step")
            publish(engines, (BLUE, GREEN)[len(reads) - 1])
        return choose(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_dir, "choose_variants", replaced_meanwhile)
    assert loaded_models(engines) == {GREEN}
    assert len(reads) == 3


def test_a_file_that_is_really_gone_is_named_at_once(engines: Path) -> None:
    path = engine_file(engines, "step")
    path.unlink()
    with pytest.raises(EngineError, match="is missing though the manifest lists it; run: nsp"):
        open_engine_dir(engines)


def test_what_was_replaced_stays_until_the_publish_after_next(engines: Path) -> None:
    for model, before in ((BLUE, RED), (GREEN, BLUE), (RED, GREEN)):
        publish(engines, model)
        models = {onnx.load(path).doc_string for path in engines.glob("*/*/model.onnx")}
        assert models == {model, before}
    assert loaded_models(engines) == {RED}


def test_a_folder_that_a_reader_holds_outlives_any_number_of_publishes(engines: Path) -> None:
    (name,) = read_manifest(engines).stages["step"][0].files
    held = engine_files.HeldFiles(engines, {name: "0"})
    for model in (BLUE, GREEN, BLUE):
        publish(engines, model)
    assert (engines / name).is_file()
    held.release()
    publish(engines, GREEN)
    assert not (engines / name).exists()


@pytest.mark.parametrize(("model", "precision"), [(BLUE, "fp32"), (RED, "fp16")])
def test_an_export_killed_at_any_move_leaves_what_was_served_or_what_is_new(
    engines: Path, monkeypatch: pytest.MonkeyPatch, model: str, precision: Precision
) -> None:
    whole, target = engines.with_name("whole"), engines.with_name("target")
    engines.rename(whole)
    found, point = [], 0
    while True:
        shutil.copytree(whole, target)
        point, left = point + 1, point + 1

        def killed(call: Callable[..., object]) -> Callable[..., object]:
            def counted(*args: object, **settings: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
                return call(*args, **settings)

            return counted

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "rmdir", "unlink"):
                patch.setattr(os, name, killed(getattr(os, name)))
            try:
                publish(target, model, precision)
            except KeyboardInterrupt:
                pass
            else:
                break
        found.append(loaded_models(target))
        publish(target, model, precision)  # and the next one ends it
        assert loaded_models(target) == {model}
        assert open_engine_dir(target, precision=precision).precision == precision
        shutil.rmtree(target)
    assert found[0] == {RED}
    assert found[-1] == {model}
    assert all(len(models) == 1 for models in found)


def test_an_export_that_dies_at_any_change_of_a_file_leaves_whole_engines(engines: Path) -> None:
    """Nothing is tidied up by a process that is killed: no `finally` runs."""
    changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.chmod")
    whole = engines.rename(engines.with_name("whole"))
    found, point, status = [], 0, 1
    while status:
        target, point = engines.with_name(f"target{point}"), point + 1
        shutil.copytree(whole, target)
        child = os.fork()
        if child == 0:
            left = point

            def die(event: str, _: object) -> None:
                nonlocal left
                left -= event in changes
                if not left:
                    os._exit(1)

            sys.addaudithook(die)
            publish(target, BLUE)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        found.append(loaded_models(target))
        publish(target, GREEN)  # and the next export ends well
        assert loaded_models(target) == {GREEN}
    assert found[0] == {RED}
    assert found[-1] == {BLUE}
    assert all(len(models) == 1 for models in found)


def test_an_unchanged_export_removes_nothing_of_the_one_before(engines: Path) -> None:
    manifest = publish(engines, BLUE)
    before = content(engines)
    store = EngineStore(engines)
    with store.lock():
        store.publish(manifest)
    assert content(engines) == before


def test_a_damaged_file_is_replaced_in_its_place(engines: Path) -> None:
    path = engine_file(engines, "decoder")
    whole = path.read_bytes()
    path.write_bytes(b"damaged")
    publish(engines, RED)
    assert path.read_bytes() == whole


def test_a_re_run_that_is_killed_early_forgets_nothing_that_was_finished(engines: Path) -> None:
    store = EngineStore(engines)
    with store.lock():
        manifest = build(store, BLUE)
        store.record(manifest)
    again = EngineStore(engines)
    with again.lock():
        first = dict(list(manifest.stages.items())[:1])
        again.record(replace(manifest, stages=first))
    staged = EngineStore(engines).staged
    assert staged is not None
    assert {v.fingerprint for vs in staged.stages.values() for v in vs} == {
        v.fingerprint for vs in manifest.stages.values() for v in vs
    }
    assert all(store.intact(v) for vs in staged.stages.values() for v in vs)


def test_an_export_that_ended_since_the_plan_is_not_overwritten(engines: Path) -> None:
    late = EngineStore(engines)
    publish(engines, BLUE)
    with pytest.raises(ExportError, match="ended just now; export again"), late.lock():
        pass


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder that no export may touch."""
    (tmp_path / "home/documents").mkdir(parents=True)
    (tmp_path / "home/documents/letter.txt").write_text("precious")
    (tmp_path / "home/lock").write_text("precious")
    return tmp_path / "home"


@pytest.mark.parametrize("name", [".export", "step", "tokenizer", "reference", "decoder"])
def test_nothing_is_written_or_removed_behind_a_link(engines: Path, home: Path, name: str) -> None:
    before = content(home)
    shutil.rmtree(engines / name, ignore_errors=True)
    (engines / name).symlink_to(home)
    with pytest.raises(ConfigError, match="symbolic link"):
        EngineStore(engines).check_is_ours(set(stages_io(CLASSES, "present", "float32")))
    with pytest.raises(ConfigError, match="symbolic link"):
        publish_everything(engines)
    assert content(home) == before
    assert (engines / name).is_symlink()


def publish_everything(folder: Path) -> None:
    """Publish with a tokenizer and recordings, without asking whether the folder is ours."""
    store = EngineStore(folder)
    with store.lock():
        listed = []
        for owner in ("tokenizer", "reference"):
            with store.new_folder() as made:
                (made / "file.json").write_text("{}")
                listed.append(store.finish(made, f"{owner}/"))
        store.publish(replace(build(store, BLUE), files=listed[0], recorded=listed[1]))


@pytest.mark.parametrize("place", [".export/step", "step/link"])
def test_a_link_deeper_in_the_folder_is_one_line(
    engines: Path, home: Path, tmp_path: Path, place: str
) -> None:
    before = content(home)
    publish(tmp_path / "other", BLUE)
    name = engine_file(tmp_path / "other", "step").parent.name
    path = engines / place.replace("link", name)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(home)
    with pytest.raises(ConfigError, match="symbolic link"):
        publish(engines, BLUE)
    assert content(home) == before


def test_a_linked_lock_leaves_what_it_leads_to(engines: Path, home: Path) -> None:
    before = content(home)
    (engines / ".export").mkdir()
    (engines / ".export/lock").symlink_to(home / "lock")
    with pytest.raises(OSError, match="lock"):
        publish(engines, BLUE)
    assert content(home) == before


def test_a_linked_folder_of_files_is_neither_read_nor_removed(engines: Path, home: Path) -> None:
    variant = engine_file(engines, "step").parent
    elsewhere = home / "variant"
    variant.rename(elsewhere)
    variant.symlink_to(elsewhere)
    with pytest.raises(EngineError, match="symbolic link"):
        open_engine_dir(engines)
    before = content(home)
    publish(engines, BLUE)
    publish(engines, GREEN)
    assert content(home) == before


@pytest.mark.parametrize("owner", ["/", "//", "/home", "..", "step/..", "."])
def test_a_hostile_manifest_makes_an_export_delete_nothing(
    engines: Path, home: Path, owner: str
) -> None:
    before = content(home)
    path = engines / "manifest.json"
    values = json.loads(path.read_text())
    victim = str(home / "documents/letter.txt")
    values["stages"][owner] = [{**values["stages"]["step"][0], "files": {victim: "0"}}]
    del values["digest"]  # whoever writes a folder writes its digest
    values["digest"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(values))
    with pytest.raises(EngineError, match="names a stage"):
        read_manifest(engines)
    publish(engines, BLUE)
    publish(engines, GREEN)
    assert content(home) == before


def test_files_of_others_in_an_engine_folder_stay(engines: Path) -> None:
    for name in ("step/notes.txt", "step/onnxruntime-fp32-mine/x", "README.md", "old/step/x"):
        (engines / name).parent.mkdir(exist_ok=True, parents=True)
        (engines / name).write_text("mine")
    for model in (BLUE, GREEN, RED):
        publish(engines, model)
    assert {name for name, text in content(engines).items() if text == b"mine"} == {
        *("step/notes.txt", "step/onnxruntime-fp32-mine/x", "README.md", "old/step/x")
    }


def test_engines_of_the_first_schema_are_removed_with_the_first_publish(engines: Path) -> None:
    names = ["step/onnxruntime-fp32/model.onnx", "tokenizer/tokenizer.json"]
    for name in [*names, "reference/calls.safetensors"]:
        (engines / name).parent.mkdir(exist_ok=True)
        (engines / name).write_text("old")
    publish(engines, BLUE)
    assert b"old" not in content(engines).values()


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "unreadable"])
def test_a_listed_file_of_another_kind_is_one_line(
    engines: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = engine_file(engines, "step")
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.with_name("other.onnx").write_bytes(content)
        path.symlink_to("other.onnx")
    else:
        path.write_bytes(content)
        denied = os.open

        def refuse(name: object, *args: int, **settings: int) -> int:
            if str(name) == str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return denied(name, *args, **settings)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", refuse)
    words = {"link": "symbolic link", "unreadable": "permission denied"}
    for verify in (True, False):
        with pytest.raises(EngineError, match=words.get(kind, "not a regular file")):
            open_engine_dir(engines, verify=verify)


def test_a_file_that_a_graph_could_read_unlisted_is_refused(engines: Path) -> None:
    path = engine_file(engines, "step").with_name("other.bin")
    path.write_bytes(b"weights of somebody else")
    with pytest.raises(EngineError, match=r"other.bin is not listed in the manifest; remove it"):
        open_engine_dir(engines)


def test_a_pointer_in_place_of_an_engine_is_named_as_one(engines: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1236544000\n"
    engine_file(engines, "step").write_text(pointer)
    with pytest.raises(
        EngineError, match=r"1,236,544,000 bytes; run: git lfs pull, or download the file itself$"
    ):
        open_engine_dir(engines)
    (engines / "manifest.json").write_text("<!DOCTYPE html><title>Sign in</title>")
    with pytest.raises(EngineError, match=r"manifest.json is damaged: it is a web page .*sign"):
        open_engine_dir(engines)
