"""A manifest is checked whole when it is read, and never leads outside its folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from nsp.errors import EngineError
from nsp.runtime.manifest import read_manifest


def write_manifest(folder: Path, stage: dict[str, Any] | None = None, **changes: Any) -> None:
    """Write a manifest of one stage, with changes to it or to its only variant."""
    variant = {
        "backend": "onnxruntime",
        "precision": "fp32",
        "kv_layout": "present",
        "opset": 23,
        "io": {"inputs": {"x": ["B 3", "float32"]}, "outputs": {}},
        "files": {"step/model.onnx": "0"},
        "fingerprint": "",
    }
    manifest = {
        "schema": 1,
        "family": "var",
        "config": {},
        "model_hash": "",
        "source": "",
        "stages": {"step": [{**variant, **(stage or {})}]},
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize(
    "name", ["../victim/keep.txt", "/etc/passwd", "x", "step/../../x", "other/x"]
)
def test_files_outside_their_stage_are_refused(name: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, {"files": {name: "0"}})
    with pytest.raises(EngineError, match="outside it"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"io": []}, "io: .* expected an object"),
        ({"io": {}}, "io: a stage is declared by its inputs and its outputs"),
        ({"io": {"inputs": [], "outputs": {}}}, "io: inputs must be an object"),
        ({"io": {"inputs": {"x": 3}, "outputs": {}}}, "inputs: tensor 'x' must be two texts"),
        ({"io": {"inputs": {}, "outputs": {"y": ["B", []]}}}, "outputs: tensor 'y'"),
        ({"io": {"inputs": {"x": ["B", "int7"]}, "outputs": {}}}, "int7"),
        ({"io": {"inputs": {"x": ["B-1", "bool"]}, "outputs": {}}}, "axis 'B-1'"),
        ({"io": {"inputs": {"x": ["(" * 9999, "bool"]}, "outputs": {}}}, r"axis '\(\("),
        ({"io": {"inputs": {"x": ["\0", "bool"]}, "outputs": {}}}, "axis"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"max_batch": "4"}, "max_batch: '4' is not allowed; expected an integer"),
        ({"kv_layout": "sideways"}, "'sideways' is not one of delta, present"),
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
        ({"sampling": {"top_k": "9"}}, "SamplingConfig.top_k: '9' is not allowed"),
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
