"""A manifest is checked whole when it is read, and never leads outside its folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from nsp.artifacts.manifest import read_manifest
from nsp.errors import EngineError
from tests.artifacts.engine_folders import CLASSES


def write_manifest(folder: Path, stage: dict[str, Any] | None = None, **changes: Any) -> None:
    """Write a manifest of one stage, with changes to it or to its only variant."""
    variant = {
        "backend": "onnxruntime",
        "precision": "fp32",
        "kv_layout": "present",
        "opset": 23,
        "io": {"inputs": {"x": ["B 3", "float32"]}, "outputs": {}},
        "files": {"step/onnxruntime-fp32-0123456789abcdef/model.onnx": "0"},
        "fingerprint": "",
    }
    manifest = {
        "schema": 3,
        "family": "var",
        "config": CLASSES.to_dict(),
        "model_hash": "",
        "source": "",
        "stages": {"step": [{**variant, **(stage or {})}]},
    }
    manifest |= changes
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": digest}))


@pytest.mark.parametrize(
    "name",
    [
        "../victim/keep.txt",
        "/etc/passwd",
        "x",
        "step/../../x",
        "other/x",
        "step/onnxruntime-fp32-0123456789abcdef/../../x",
        "step/onnxruntime-fp32-0123456789abcdef/.hidden",
        "step//model.onnx",
        "step/onnxruntime-fp32/model.onnx",
        "decoder/onnxruntime-fp32-0123456789abcdef/model.onnx",
        "step/onnxruntime-fp32-0123456789abcdef/model.onnx\n",
    ],
)
def test_files_that_no_export_writes_are_refused(name: str, tmp_path: Path) -> None:
    for listed in ({"stage": {"files": {name: "0"}}}, {"files": {name: "0"}}):
        write_manifest(tmp_path, **listed)
        with pytest.raises(EngineError, match="which no export writes"):
            read_manifest(tmp_path)
    write_manifest(tmp_path, recorded={name: "0"})
    with pytest.raises(EngineError, match="which no export writes"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("stage", ["/", "//", "..", "", "tokenizer", ".export", "Step", "x" * 9999])
def test_a_stage_that_the_family_does_not_have_is_refused(stage: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, stages={stage: []})
    with pytest.raises(EngineError, match="a model of family var has condition, step") as caught:
        read_manifest(tmp_path)
    assert len(str(caught.value)) < 900


def test_a_manifest_that_was_changed_is_refused_and_may_be_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_manifest(tmp_path, sampling={"guidance_scale": 2.0})
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"guidance_scale": 2.0', '"guidance_scale": 6.0'))
    with pytest.raises(EngineError, match="changed since it was written"):
        read_manifest(tmp_path)
    assert read_manifest(tmp_path, verify=False).sampling["guidance_scale"] == 6.0
    assert "changed since it was written; using it without verification" in caplog.text


def test_how_a_manifest_is_spaced_and_ordered_is_no_change(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    before = read_manifest(tmp_path)
    path = tmp_path / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(values.items())), indent=3))
    assert read_manifest(tmp_path) == before


def test_a_linked_manifest_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(EngineError, match="symbolic link"):
        read_manifest(tmp_path / "other")


def test_engines_of_the_first_schema_are_refused_with_the_command_that_rebuilds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models/red").mkdir(parents=True)
    stages = {"step": [{"precision": "fp32"}, {"precision": "fp16"}, {"precision": 3}, None]}
    values = {"schema": 1, "source": "../models/red", "stages": stages}
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines/manifest.json").write_text(json.dumps(values))
    (tmp_path / "models/red/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match="has schema 1, this nsp reads 3; run: nsp") as caught:
        read_manifest(Path("engines"))
    assert str(caught.value).endswith("--engine-dir engines --checkpoint models/red --fp16")


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"io": []}, "io: .* expected an object"),
        ({"io": {}}, "io: the declaration of a stage must be an object"),
        ({"io": {"inputs": [], "outputs": {}}}, "io: inputs must be an object"),
        ({"io": {"inputs": {"x": 3}, "outputs": {}}}, "inputs: tensor 'x' must be two texts"),
        ({"io": {"inputs": {}, "outputs": {"y": ["B", []]}}}, "outputs: tensor 'y'"),
        ({"io": {"inputs": {"x": ["B", "int7"]}, "outputs": {}}}, "int7"),
        ({"io": {"inputs": {"x": ["B-1", "bool"]}, "outputs": {}}}, "axis 'B-1'"),
        ({"io": {"inputs": {"x": ["(" * 9999, "bool"]}, "outputs": {}}}, r"axis '\(\("),
        ({"io": {"inputs": {"x": ["\0", "bool"]}, "outputs": {}}}, "axis"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"max_batch": "4"}, "max_batch: '4' is not allowed; expected an integer"),
        ({"kv_layout": "sideways"}, "'sideways' is not one of delta, fixed, in_place, present"),
        ({"precision": "fp8"}, "precision: 'fp8' is not allowed; expected one of fp32, fp16, bf16"),
        ({"files": None}, r"stages\.step\[0\]: Variant\.files"),
        ({"profiles": [3]}, r"profiles\[0\]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_variant_is_named(stage: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, stage)
    with pytest.raises(EngineError, match=words) as caught:
        read_manifest(tmp_path)
    assert f"{tmp_path / 'manifest.json'} is damaged (" in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": "1"}, "Manifest.schema: '1' is not allowed; expected an integer"),
        ({"schema": True}, "Manifest.schema: True is not allowed"),
        ({"sampling": {"top_k": "9"}}, "VarSampling.top_k: '9' is not allowed"),
        ({"sampling": {"top_p": 7}}, "top_p=7"),
        ({"sampling": []}, "Manifest.sampling"),
        ({"stages": {"step": {}}}, "Manifest.stages.step"),
        ({"stages": {"step": [3]}}, r"Manifest.stages.step\[0\]: .*expected a JSON object"),
        ({"config": None}, "Manifest.config"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_manifest_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, **changes)
    with pytest.raises(EngineError, match=words) as caught:
        read_manifest(tmp_path)
    assert f"{tmp_path / 'manifest.json'} is damaged (" in str(caught.value)


def test_deep_nesting_is_damage(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(EngineError, match=r"is damaged \(nested too deeply\)"):
        read_manifest(tmp_path)
