"""What an export promises about its folder: reuse, resume, replacement, nothing half-written."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import nsp.export.build
import nsp.export.plan
from nsp.artifacts.checkpoint import write_digests
from nsp.artifacts.engine_files import check_files
from nsp.artifacts.manifest import read_manifest
from nsp.artifacts.repair import find_source, repair
from nsp.errors import CheckpointError, ConfigError, EngineError, ExportError
from nsp.export.options import ExportEvent, ExportOptions
from nsp.export.run import export as run_export
from nsp.export.run import find_checkpoint, plan
from nsp.pipeline.pipeline import load_pipeline
from nsp.stage.arena import PresentArena
from tests.artifacts.engine_folders import change_manifest, engine_file

STAGES = ("text_encoder", "condition", "step", "select", "select_smooth", "accumulate", "decoder")


def actions(options: ExportOptions) -> dict[str, str]:
    return {build.stage: build.action for build in plan(options)}


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def engines(half_engines, tmp_path) -> Path:
    """A copy of finished engines in both precisions, to be changed."""
    shutil.copytree(half_engines[0], tmp_path / "engines")
    return tmp_path / "engines"


@pytest.fixture
def interrupt(monkeypatch):
    """Make the tracing of one stage fail with an error."""

    def at(stage: str, error: BaseException) -> None:
        trace = nsp.export.build.export_stage

        def failing(*args, name, **settings):
            if name == stage:
                raise error
            return trace(*args, name=name, **settings)

        monkeypatch.setattr(nsp.export.build, "export_stage", failing)

    return at


def test_an_export_is_a_folder_that_loads_and_explains_itself(half_engines, small_checkpoint):
    folder, manifest = half_engines
    assert read_manifest(folder) == manifest
    assert tuple(manifest.stages) == STAGES
    assert manifest.backends() == ("onnxruntime",)
    for variants in manifest.stages.values():
        assert [v.precision for v in variants] == ["fp32", "fp16"]
        for variant in variants:
            check_files(folder, variant.files)
            assert variant.tools["torch"].startswith("2.13")
            assert variant.tools["onnxruntime"]
            assert variant.parity["images"] == 9
    tokenizer = {path.name for path in (small_checkpoint / "tokenizer").iterdir()}
    assert {name.split("/")[2] for name in manifest.files} == tokenizer
    check_files(folder, {**manifest.files, **manifest.recorded})
    listed = {n for vs in manifest.stages.values() for v in vs for n in v.files}
    listed |= {*manifest.files, *manifest.recorded}
    assert files_below(folder) == listed | {"manifest.json"}
    assert manifest.source == small_checkpoint.parent.name


def test_stages_without_narrow_weights_share_one_file(half_engines):
    _, manifest = half_engines
    shared = {stage for stage, (full, half) in manifest.stages.items() if full.files == half.files}
    assert shared == {"text_encoder", "select", "select_smooth", "accumulate"}


def test_a_second_export_reuses_everything_without_the_model(engines, options, monkeypatch):
    def no_builder(*args):
        raise AssertionError("nothing was to be built")

    monkeypatch.setattr(nsp.export.build, "StageBuilder", no_builder)
    builds = plan(options)
    assert {b.action for b in builds} == {"reuse"}
    assert all("unchanged" in b.reason for b in builds)

    def marks() -> dict[str, tuple[int, int]]:
        stats = {name: (engines / name).stat() for name in files_below(engines)}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    before = marks()
    run_export(options)
    assert marks() == before
    load_pipeline(engines)


def test_exporting_one_precision_keeps_the_other(engines, options):
    manifest = run_export(options)
    assert {v.precision for v in manifest.stages["step"]} == {"fp32", "fp16"}
    check_files(engines, manifest.stages["step"][1].files)


def test_a_tampered_file_is_rebuilt_and_nothing_else(engines, options):
    path = engine_file(engines, "decoder")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    builds = {b.stage: b for b in plan(options)}
    assert Counter(b.action for b in builds.values()) == {"reuse": 6, "build": 1}
    assert builds["decoder"].action == "build"
    assert "damaged" in builds["decoder"].reason
    run_export(options)
    assert path.read_bytes() == whole


def test_rebuild_builds_again(engines, options):
    assert set(actions(replace(options, rebuild=True)).values()) == {"build"}


def test_another_model_replaces_what_was_there(engines, options, other_checkpoint):
    options = replace(options, checkpoint=str(other_checkpoint))
    assert {b.reason for b in plan(options)} == {"another model"}
    before = read_manifest(engines).model_hash
    manifest = run_export(options)
    assert manifest.model_hash != before
    assert {v.precision for vs in manifest.stages.values() for v in vs} == {"fp32"}
    assert list(engines.glob("*/*-fp16-*")), "who reads the engines of before still can"
    assert load_pipeline(engines).model_hash == manifest.model_hash


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("crash")])
def test_an_interrupted_export_goes_on_where_it_stopped(options, interrupt, monkeypatch, error):
    folder = Path(options.engine_dir)
    with monkeypatch.context():
        interrupt("select", error)
        with pytest.raises(type(error)):
            run_export(options)
        monkeypatch.undo()
    with pytest.raises(EngineError, match=r"not finished.*nsp export"):
        load_pipeline(folder)
    assert not (folder / ".export/select").is_dir() or not any(
        (folder / ".export/select").iterdir()
    )
    assert list(actions(options).values()) == ["reuse"] * 3 + ["build"] * 4
    assert {b.reason for b in plan(options)[:3]} == {"finished before the export was interrupted"}
    run_export(options)
    assert not (folder / ".export").exists()
    load_pipeline(folder)


def test_an_export_interrupted_after_its_last_stage_still_tries_whole_images(options, monkeypatch):
    def stop(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nsp.export.build, "check_images", stop)
        with pytest.raises(KeyboardInterrupt):
            run_export(options)
    assert set(actions(options).values()) == {"reuse"}
    manifest = run_export(options)
    assert manifest.stages["decoder"][0].parity["free_running"]["token_agreement"] == 1


def test_the_repair_command_names_the_model_wherever_it_lies(engines, options, monkeypatch):
    manifest = run_export(options)
    monkeypatch.chdir(engines)
    checkpoint = Path(options.checkpoint).resolve()
    with pytest.raises(CheckpointError, match=r"is not in runs/.*give it with --checkpoint"):
        find_source(engines, manifest)
    command = repair(engines, manifest)
    assert command.endswith(f"--checkpoint {manifest.source} --target onnxruntime --fp16 --fp32")
    monkeypatch.chdir(checkpoint.parent.parent)
    assert find_source(engines, manifest) == checkpoint
    assert f"--checkpoint {manifest.source}/checkpoint --target" in repair(engines, manifest)


def test_another_model_of_the_same_name_is_not_taken_for_the_source(
    engines, options, other_checkpoint, tmp_path, monkeypatch
):
    manifest = run_export(options)
    shutil.copytree(other_checkpoint, tmp_path / "runs" / manifest.source / "checkpoint")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="has another model"):
        find_source(engines, manifest)


def test_replacing_the_engines_of_another_model_is_said(options, other_checkpoint, caplog):
    run_export(replace(options, checkpoint=str(other_checkpoint)))
    run_export(options)
    names = [Path(path).parent.name for path in (other_checkpoint, options.checkpoint)]
    assert "replacing the engines of {} by those of {}".format(*names) in caplog.text


@pytest.mark.parametrize("place", ["tokenizer/vocab.json", "step/1.txt", "manifest.json"])
def test_a_folder_of_something_else_is_left_alone(options, place):
    path = Path(options.engine_dir) / place
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "a web application"}')
    with pytest.raises(ConfigError, match="which no export wrote; choose another --engine-dir"):
        run_export(options)
    assert path.read_text() == '{"name": "a web application"}'


@pytest.mark.parametrize("kind", ["file", "checkpoint", "below a file"])
def test_a_plan_refuses_what_an_export_refuses(kind, options, small_checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    places = {"file": "file", "below a file": "file/engines", "checkpoint": small_checkpoint}
    options = replace(options, engine_dir=str(tmp_path / places[kind]))
    for verb in (plan, run_export):
        with pytest.raises((ConfigError, OSError), match="choose another --engine-dir"):
            verb(options)


def test_a_model_of_which_a_phase_was_never_trained_is_exported_with_a_warning(
    small_checkpoint, options, tmp_path, caplog
):
    folder = tmp_path / "half"
    shutil.copytree(small_checkpoint, folder)
    values = json.loads((folder / "config.json").read_text())
    phases = [{"name": "tokenizer"}, {"name": "predictor"}]
    values["notes"] = {"run": {"phases": phases}, "steps": {"tokenizer": 4}}
    (folder / "config.json").write_text(json.dumps(values))
    write_digests(folder)
    plan(replace(options, checkpoint=str(folder)))
    assert "half: never trained: predictor" in caplog.text


def test_a_lost_manifest_is_no_obstacle(engines, options):
    (engines / "manifest.json").unlink()
    run_export(options)
    load_pipeline(engines)


def test_a_damaged_manifest_is_no_obstacle(engines, options, caplog):
    (engines / "manifest.json").write_text('{"schema": 1,')
    assert {b.reason for b in plan(options)} == {"not exported yet"}
    assert "is damaged" in caplog.text
    run_export(options)
    load_pipeline(engines)


def test_engines_stay_usable_while_others_are_made_in_their_place(
    engines, options, other_checkpoint, interrupt
):
    before = {name: (engines / name).read_bytes() for name in files_below(engines)}
    interrupt("accumulate", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_export(replace(options, checkpoint=str(other_checkpoint)))
    for name, content in before.items():
        assert (engines / name).read_bytes() == content
    load_pipeline(engines)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_engines_stay_usable_when_the_last_move_fails(
    engines, options, other_checkpoint, monkeypatch, error
):
    before = {name: (engines / name).read_bytes() for name in files_below(engines)}
    replace_file = os.replace

    def fails_at_the_manifest(source, target):
        if Path(target) == engines / "manifest.json":
            raise error
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fails_at_the_manifest)
        with pytest.raises((ExportError, KeyboardInterrupt)):
            run_export(replace(options, checkpoint=str(other_checkpoint)))
    for name, content in before.items():
        assert (engines / name).read_bytes() == content, name
    load_pipeline(engines)
    again = replace(options, checkpoint=str(other_checkpoint))
    assert set(actions(again).values()) == {"reuse"}
    assert load_pipeline(engines).model_hash != run_export(again).model_hash


def test_a_full_disk_is_one_line_and_loses_nothing(options, interrupt):
    interrupt("step", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ExportError, match=r"disk is full.*finished stages stay") as caught:
        run_export(options)
    assert "\n" not in str(caught.value)
    assert actions(options)["condition"] == "reuse"


def test_too_little_space_is_found_before_anything_is_written(options, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match=r"needs about \d+ MiB.*--engine-dir"):
        run_export(options)
    assert not Path(options.engine_dir).exists()


def test_a_plan_writes_nothing(options):
    builds = plan(options)
    assert [b.stage for b in builds] == list(STAGES)
    assert {b.action for b in builds} == {"build"}
    assert all(b.estimated_bytes > 0 for b in builds)
    assert not Path(options.engine_dir).exists()


def test_a_failed_first_export_leaves_no_folder(options, interrupt):
    interrupt("text_encoder", RuntimeError("crash"))
    with pytest.raises(RuntimeError):
        run_export(options)
    assert not Path(options.engine_dir).exists()


def test_two_exports_at_once_are_refused(options, interrupt, monkeypatch):
    from nsp.export.store import EngineStore

    with (
        EngineStore(Path(options.engine_dir)).lock(),
        pytest.raises(ExportError, match="another export"),
    ):
        run_export(options)


def test_non_finite_weights_are_refused_before_anything_is_kept(
    small_checkpoint, options, tmp_path
):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(small_checkpoint, broken)
    path = next((broken / "predictor").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["head.bias"][3] = float("nan")
    save_file(tensors, path)
    write_digests(broken)
    with pytest.raises(CheckpointError, match=r"head\.bias"):
        run_export(replace(options, checkpoint=str(broken)))
    assert not Path(options.engine_dir).exists()


def test_progress_never_goes_back_and_ends_at_one(engines, options):
    events: list[ExportEvent] = []
    engine_file(engines, "accumulate").unlink()
    run_export(options, on_event=events.append)
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert [e.phase for e in events if e.stage == "accumulate"] == [
        *("reference", "onnx", "lint", "parity")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("tpu",)}, "unknown target 'tpu'; known: auto, onnxruntime"),
        ({"precisions": ("bf16",)}, "onnxruntime has only .*, not bf16.*--fp16"),
        ({"targets": ("tensorrt-rtx",), "gpu_archs": ("90",)}, "'90'.*80, 86, 89"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_written(options, change, message):
    with pytest.raises(ConfigError, match=message):
        run_export(replace(options, **change))
    assert not Path(options.engine_dir).exists()


@pytest.mark.parametrize(
    "values",
    [
        {"precisions": ("fp8",)},
        {"max_batch": 0},
        {"targets": ()},
        {"build_timeout_s": 0},
        {"build_timeout_s": math.nan},
        {"build_timeout_s": math.inf},
    ],
)
def test_options_are_checked(values):
    with pytest.raises(ConfigError):
        ExportOptions(checkpoint="x", **values)


def test_the_newest_run_is_exported_by_default(small_checkpoint, tmp_path):
    import os

    for name, time in (("old", 1), ("new", 2)):
        folder = tmp_path / "runs" / name / "checkpoint"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        os.utime(folder / "config.json", (time, time))
    assert find_checkpoint(tmp_path) == tmp_path / "runs/new/checkpoint"


def test_the_reason_for_a_build_names_the_tool_that_changed(engines, options):
    manifest = read_manifest(engines)
    older = (
        replace(v, tools={**v.tools, "onnxruntime": "1.0"}, fingerprint="0")
        for v in manifest.stages["step"]
    )
    change_manifest(engines, stages={**manifest.stages, "step": tuple(older)})
    reasons = {b.stage: b.reason for b in plan(options)}
    assert reasons["step"].startswith("onnxruntime was 1.0 and is now 1.")


def test_engines_of_other_code_are_built_again(engines, options, monkeypatch):
    monkeypatch.setattr(nsp.export.plan, "code_digest", lambda family: "after an edit")
    builds = [build for build in plan(options) if build.action != "share"]
    assert {build.action for build in builds} == {"build"}
    assert all(build.reason.startswith("other code") for build in builds)


def test_planning_and_reusing_need_no_torch(engines, options):
    code = (
        "import json, sys; from nsp.export.run import ExportOptions, export, plan; "
        "options = ExportOptions.from_dict(json.loads(sys.argv[1])); "
        "plan(options); export(options); "
        "print([name for name in ('torch', 'onnx', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, json.dumps(options.to_dict())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_model_whose_guidance_ends_early_is_exported_and_checked(
    small_checkpoint, tmp_path, options, monkeypatch
):
    folder = tmp_path / "early"
    shutil.copytree(small_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["sampling"] = {"guidance_scale": 3.0, "guidance_until": 2}
    (folder / "config.json").write_text(json.dumps(config))
    write_digests(folder)
    kept, keep_rows = [], PresentArena.keep_rows

    def noting(arena, rows):
        kept.append((arena.shape.rows, rows))
        keep_rows(arena, rows)

    monkeypatch.setattr(PresentArena, "keep_rows", noting)
    manifest = run_export(replace(options, checkpoint=str(folder)))
    assert kept
    assert all(before == 2 * rows for before, rows in kept)
    (step,) = manifest.stages["step"]
    assert all(scale["agreement"] == 1 for scale in step.parity["units"])
