"""`nsp verify`: sound engines pass, wrong ones are named with their first wrong tensor."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nsp.artifacts.manifest import file_sha256, read_manifest, write_manifest
from nsp.cli import main
from nsp.errors import CheckpointError, EngineError
from nsp.export import build
from nsp.export.proof.recorded import read_recorded
from nsp.export.proof.verify import verify
from tests.artifacts.engine_folders import change_manifest, engine_file

STAGES = ["text_encoder", "condition", "step", "select", "select_smooth", "accumulate", "decoder"]


@pytest.fixture
def engines(half_engines, small_checkpoint, tmp_path, monkeypatch) -> Path:
    """A copy of finished engines, to be changed, where their checkpoint is found by its name."""
    monkeypatch.chdir(small_checkpoint.parents[1])
    folder = tmp_path / "engines"
    shutil.copytree(half_engines[0], folder)
    return folder


def spoil(folder: Path, stage: str, precision: str = "fp32") -> tuple[str, str]:
    """Change the last weight matrix of a stage, behind the manifest's back.

    Returns the first tensor that is wrong, and the operator that makes it.
    """
    manifest = read_manifest(folder)
    (variant,) = (v for v in manifest.stages[stage] if v.precision == precision)
    name = next(iter(variant.files))
    model = onnx.load(folder / name)
    weight = [w for w in model.graph.initializer if len(w.dims) >= 2][-1]
    values = onnx.numpy_helper.to_array(weight)
    values = (values + 0.5).astype(values.dtype)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, folder / name)
    files = {**variant.files, name: file_sha256(folder / name)}
    changed = dataclasses.replace(variant, files=files)
    variants = tuple(changed if v == variant else v for v in manifest.stages[stage])
    stages = {**manifest.stages, stage: variants}
    write_manifest(folder, dataclasses.replace(manifest, stages=stages))
    node = next(n for n in model.graph.node if weight.name in n.input)
    return node.output[0], node.op_type


def nsp(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_every_stage_of_sound_engines_passes_against_pytorch(half_engines, small_checkpoint):
    found = verify(half_engines[0], checkpoint=small_checkpoint, precision="fp16")
    assert [check.stage for check in found.stages] == STAGES
    assert all(check.passed and check.calls for check in found.stages)
    assert (found.backend, found.precision) == ("onnxruntime", "fp16")
    assert found.reference == "PyTorch float32, now"
    assert found.failure() is None


def test_without_torch_stages_are_held_to_the_recorded_outputs(half_engines):
    code = (
        "import sys; sys.modules['torch'] = None\n"  # importing it is an ImportError
        "from pathlib import Path; from nsp.export.proof.verify import verify\n"
        "found = verify(Path(sys.argv[1]), recorded=True)\n"
        "print(found.reference, *(c.stage for c in found.stages if c.passed and c.calls), sep='|')"
    )
    command = [sys.executable, "-c", code, str(half_engines[0])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split("|") == ["outputs recorded at export", *STAGES]


@pytest.mark.parametrize(("stage", "precision"), [("accumulate", "fp32"), ("step", "fp16")])
def test_a_wrong_weight_is_found_at_the_operator_that_reads_it(
    engines, small_checkpoint, monkeypatch, stage, precision
):
    # The fresh graph is one that was traced for the engines.
    monkeypatch.setattr("nsp.export.graph.onnx_export.export_stage", build.export_stage)
    tensor, op = spoil(engines, stage, precision)
    result = nsp("verify", engines, "--checkpoint", small_checkpoint, f"--{precision}")
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: {stage} (onnxruntime {precision}): call 0")
    assert repr(tensor) in line
    assert f"output of {op} " in line
    assert "Traceback" not in result.stderr
    assert "decoder" in result.stdout  # the others are checked all the same


def test_recorded_outputs_catch_a_wrong_weight_too(engines):
    spoil(engines, "decoder")
    result = nsp("verify", engines, "--recorded", "--json")
    assert result.exit_code == 1
    checks = {check["stage"]: check for check in json.loads(result.stdout)["stages"]}
    assert [name for name, check in checks.items() if not check["passed"]] == ["decoder"]
    assert "--checkpoint" in checks["decoder"]["first_wrong"]


def test_recorded_calls_are_those_of_one_image(half_engines):
    folder, manifest = half_engines
    recordings = read_recorded(folder, manifest)
    assert {call.stage for each in recordings for call in each.calls} == set(STAGES)
    (image,) = (c.outputs["image"] for c in recordings[0].calls if c.stage == "decoder")
    assert image.shape[0] == 1
    (recorded,) = manifest.recorded
    assert (folder / recorded).stat().st_size < 2**20


def test_what_cannot_be_verified_is_one_line(engines, tmp_path, small_checkpoint, other_checkpoint):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "missing", tmp_path / "empty"):
        result = nsp("verify", folder)
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1
        assert "nsp export" in result.stderr
    with pytest.raises(CheckpointError, match="another model"):
        verify(engines, checkpoint=other_checkpoint)
    manifest = read_manifest(engines)
    (name,) = manifest.recorded
    path = engines / name
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, "model_hash": "0"})
    with pytest.raises(EngineError, match="differs from what was exported"):
        verify(engines, recorded=True)
    change_manifest(engines, recorded={name: file_sha256(path)})
    with pytest.raises(EngineError, match="another model"):
        verify(engines, recorded=True)
    path.write_bytes(path.read_bytes()[:100])
    change_manifest(engines, recorded={name: file_sha256(path)})
    with pytest.raises(EngineError, match="damaged"):
        verify(engines, recorded=True)
    path.unlink()
    with pytest.raises(EngineError, match="is missing"):
        verify(engines, recorded=True)
    change_manifest(engines, recorded={})
    with pytest.raises(EngineError, match="no recorded outputs"):
        verify(engines, recorded=True)
    graph = engine_file(engines, "decoder")
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(EngineError, match="nsp export"):
        verify(engines, checkpoint=small_checkpoint)
