import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from nsp.artifacts.manifest import SCHEMA, Manifest, Variant, write_manifest
from nsp.cli import main
from nsp.families.var.config import SIZES
from tests.models import stages_io

NAME = "decoder/onnxruntime-fp16-0123456789abcdef/model.onnx"


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """An engine folder of one stage whose file is no engine: `inspect` reads the manifest only."""
    config = SIZES["tiny"]
    content = b"decoder"
    name = NAME
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(content)
    variant = Variant(
        backend="onnxruntime",
        precision="fp16",
        kv_layout="present",
        opset=23,
        io=stages_io(config, "present", "float16")["decoder"].to_dict(),
        files={name: hashlib.sha256(content).hexdigest()},
        profiles=({"latent": [[1, 8, 4, 4], [2, 8, 4, 4], [4, 8, 4, 4]]},),
        max_batch=4,
        precision_map={"norm_out": "float32"},
        tools={"onnx": "1.23.2"},
        device={"target": "cpu"},
        parity={"psnr_db": 51.25},
        fingerprint="f" * 64,
    )
    manifest = Manifest(
        schema=SCHEMA,
        family="var",
        config=config.to_dict(),
        model_hash="abc123",
        source="tests",
        stages={"decoder": (variant,)},
    )
    write_manifest(tmp_path, manifest)
    return tmp_path


def inspect(*args: object) -> str:
    result = CliRunner().invoke(main, ["inspect", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_everything_the_manifest_says_about_a_stage_is_shown(engines):
    shown = inspect(engines, "--all")
    facts = ["var", "abc123", "decoder", "onnxruntime", "fp16", "none", "23", "psnr_db=51.25"]
    facts += [
        "norm_out",
        "float32",
        'onnx="1.23.2"',
        "profile 0",
        "model.onnx",
        "KiB",
        'target="cpu"',
    ]
    for fact in facts:
        assert fact in shown, fact


def test_without_all_each_stage_is_one_line_with_its_parity(engines):
    shown = inspect(engines)
    (line,) = [line for line in shown.splitlines() if line.startswith("decoder")]
    assert line.split()[-2:] == ["51.2", "dB"]
    assert "profile 0" not in shown


def test_json_is_the_manifest_with_sizes(engines):
    found = json.loads(inspect(engines, "--json"))
    assert found.pop("kind") == "engines"
    assert found.pop("folder") == str(engines)
    assert found.pop("sizes") == {NAME: 7}
    manifest = json.loads((engines / "manifest.json").read_text())
    assert {**found, "digest": manifest["digest"]} == manifest


def test_a_missing_file_is_called_missing(engines):
    (engines / NAME).unlink()
    assert "missing" in inspect(engines)
    assert json.loads(inspect(engines, "--json"))["sizes"] == {NAME: None}
