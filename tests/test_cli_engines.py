"""The main line through the command line: export, inspect, generate, bench, all from one folder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from nsp.benchmarks.options import QUICK
from nsp.cli import main
from nsp.data.image_files import read_metadata
from nsp.pipeline.pipeline import load_pipeline
from tests.data.picture_files import encoded, write_captioned, write_files
from tests.disk import largest_file

ROOT = Path(__file__).parent.parent


def nsp(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def export(checkpoint: Path, folder: Path, *options: object) -> Result:
    target = ("--target", "onnxruntime")
    return nsp("export", "--checkpoint", checkpoint, "--engine-dir", folder, *target, *options)


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("cli") / "engines"
    return folder, export(tiny_checkpoint, folder, "--fp32")


@pytest.fixture
def engines(exported) -> Path:
    folder, result = exported
    assert result.exit_code == 0, result.output
    return folder


def test_export_ends_with_parity_the_folder_and_the_next_command(engines, exported):
    _, result = exported
    parity, *rest = result.stdout.splitlines()
    assert parity.startswith("parity of onnxruntime fp32: step 100.00% of ")
    assert parity.endswith(" dB")
    assert rest == [
        f"engines: {engines} (onnxruntime)",
        f'next: nsp generate --engine-dir {engines} --prompt "…"',
    ]
    assert "step onnxruntime fp32" in result.stderr


def test_export_again_reuses_every_stage(engines, tiny_checkpoint):
    before = {path: path.stat().st_mtime_ns for path in engines.rglob("*.onnx")}
    assert before
    result = export(tiny_checkpoint, engines, "--fp32")
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in engines.rglob("*.onnx")} == before


def test_a_dry_run_says_what_would_be_built_and_writes_nothing(tiny_checkpoint, engines, tmp_path):
    for folder, action in ((tmp_path / "new", "build"), (engines, "reuse")):
        result = export(tiny_checkpoint, folder, "--fp32", "--dry-run", "--json")
        planned = json.loads(result.stdout)
        assert {each["stage"] for each in planned} >= {"text_encoder", "step", "decoder"}
        assert {each["action"] for each in planned} == {action}
    assert not (tmp_path / "new").exists()
    shown = export(tiny_checkpoint, engines, "--fp32", "--dry-run").stdout
    assert "decoder" in shown
    assert "reuse" in shown


def test_generate_from_engines_makes_the_pictures_of_the_checkpoint(
    engines, tiny_checkpoint, tmp_path
):
    for name, model in (("a", ("--engine-dir", engines)), ("b", ("--checkpoint", tiny_checkpoint))):
        options = ("--output-dir", tmp_path / name, "--prompt", "red apple", "--seed", 5)
        result = nsp("generate", *model, *options)
        assert result.exit_code == 0, result.output
    paths = [tmp_path / name / "000_red-apple_seed5.png" for name in "ab"]
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in paths)
    assert np.abs(ours - theirs).max() <= 1
    ours_say, theirs_say = map(read_metadata, paths)
    assert ours_say.pop("backend") == "onnxruntime"
    assert theirs_say.pop("backend") == "torch"
    assert ours_say == theirs_say  # the fingerprint of the model too


def test_generate_from_engines_imports_no_training_package(engines, tmp_path):
    script = """
import sys
from nsp import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "diffusers", "onnx"} & set(sys.modules)
assert not heavy, heavy
"""
    options = ("--engine-dir", str(engines), "--output-dir", str(tmp_path), "--prompt", "cat")
    command = [sys.executable, "-c", script, "generate", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "contact_sheet.png").exists()


def test_inspect_shows_every_stage_with_its_parity(engines):
    shown = nsp("inspect", engines)
    assert shown.exit_code == 0
    manifest = json.loads(nsp("inspect", engines, "--json").stdout)
    assert manifest["model_hash"] == load_pipeline(engines).model_hash
    for stage, variants in manifest["stages"].items():
        assert stage in shown.stdout
        assert all(variant["parity"] for variant in variants)
    assert all(size > 0 for size in manifest["sizes"].values())


def test_bench_ends_with_three_reports_and_json_is_one_line(
    engines, tiny_checkpoint, tmp_path, monkeypatch
):
    small = {"engine_processes": 0, "baseline_processes": 0, "gemm_side": 64}
    monkeypatch.setattr("nsp.benchmarks.options.QUICK", {**QUICK, **small})
    options = ("--engine-dir", engines, "--checkpoint", tiny_checkpoint, "--output-dir", tmp_path)
    result = nsp("bench", *options, "--quick", "--rounds", 2, "--batch-size", 1)
    assert result.exit_code == 0, result.output
    *_, report, data, page = result.stdout.splitlines()
    assert page == f"page: {tmp_path / 'bench.html'}"
    assert report == f"report: {tmp_path / 'bench.md'}"
    assert data == f"data: {tmp_path / 'bench.json'}"
    assert (tmp_path / "bench.md").exists()
    assert json.loads((tmp_path / "bench.json").read_text())
    alone = nsp("bench", *options, "--quick", "--rounds", 2, "--batch-size", 1, "--json")
    assert json.loads(alone.stdout)["batches"][0]["p50_ms"] > 0


def test_a_full_disk_during_export_is_one_line_and_leaves_no_manifest(tiny_checkpoint, tmp_path):
    with largest_file(10_000):
        result = export(tiny_checkpoint, tmp_path / "engines", "--fp32")
    assert result.exit_code == 1, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "engines/manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--target", "frob"), 2, ("'frob'", "tensorrt-rtx")),
        (("--bf16",), 2, ("onnxruntime has only fp32, fp16, int8, not bf16", "--fp16")),
        (("--max-batch", "0"), 2, ("--max-batch", "0")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_export_that_cannot_be_is_one_line(tiny_checkpoint, tmp_path, options, code, words):
    result = export(tiny_checkpoint, tmp_path / "engines", *options)
    assert result.exit_code == code, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert not (tmp_path / "engines").exists()


def test_export_without_a_checkpoint_names_both_places_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nsp.export.run.DEMO", tmp_path / "nsp/demo")
    result = nsp("export")
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert "runs" in line
    assert "demo" in line
    assert "--checkpoint" in line


def test_fidelity_is_measured_on_seen_and_held_out_captions(engines, tiny_checkpoint, tmp_path):
    data, out = write_captioned(tmp_path / "pictures"), tmp_path / "out"
    words = ("--fidelity", "--engine-dir", engines, "--output-dir", out, "--num-captions", 2)
    words += ("--data", data, "--checkpoint", tiny_checkpoint)
    result = nsp("bench", *words, "--guidance-until", 1)
    assert result.exit_code == 0, result.stderr
    assert "held out: recall@1" in result.stdout
    assert "tokenizer: recall@1" in result.stdout
    found = json.loads((out / "fidelity.json").read_text())
    assert [split["name"] for split in found["splits"]] == ["seen", "held out"]
    assert [split["recall_at_1"]["count"] for split in found["splits"]] == [2, 2]
    assert (found["num_distinct"], found["precision"]) == (4, "fp32")
    assert found["sampling"]["guidance_until"] == 1
    written = (out / "fidelity.md").read_text()
    assert "| held out | 2 |" in written
    assert "`guidance_until` is 1." in written
    assert (out / "fidelity.png").is_file()


def test_fidelity_needs_held_out_captions(engines, tmp_path):
    write_files(tmp_path / "plain", {"a.png": encoded(".png"), "a.txt": "red"})
    words = ("--fidelity", "--engine-dir", engines, "--data", tmp_path / "plain")
    result = nsp("bench", *words, "--output-dir", tmp_path / "out")
    assert result.exit_code == 1
    assert "no list of held-out samples" in result.stderr
