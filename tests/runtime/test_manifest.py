"""A manifest never leads outside its folder, whoever wrote it."""

import json
from pathlib import Path

import pytest

from nsp.errors import EngineError
from nsp.runtime.manifest import read_manifest


@pytest.mark.parametrize(
    "name", ["../victim/keep.txt", "/etc/passwd", "x", "step/../../x", "other/x"]
)
def test_files_outside_their_stage_are_refused(name: str, tmp_path: Path) -> None:
    variant = {
        "backend": "onnxruntime",
        "precision": "fp32",
        "kv_layout": "present",
        "opset": 23,
        "io": {},
        "files": {name: "0"},
        "fingerprint": "",
    }
    manifest = {
        "schema": 1,
        "family": "var",
        "config": {},
        "model_hash": "",
        "source": "",
        "stages": {"step": [variant]},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match="outside it"):
        read_manifest(tmp_path)
