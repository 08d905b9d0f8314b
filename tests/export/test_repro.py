"""A missed gate leaves a folder and a command of Polygraphy that shows it again."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nsp.backends.onnxruntime.ort_backend import CPU, OnnxRuntimeBackend
from nsp.errors import ParityError
from nsp.export.options import ExportOptions
from nsp.export.proof.gates import LIMITS
from nsp.export.proof.repro import reproducible
from nsp.export.proof.verify import verify
from nsp.export.run import export as run_export
from nsp.family.gate import RANGE
from tests.export.small import write_model
from tests.export.test_verify import nsp as run_nsp
from tests.export.test_verify import spoil


def run(line: str) -> int:
    """Run the command at the end of an error and return its exit code."""
    command = shlex.split("polygraphy run" + line.partition("polygraphy run")[2].partition(";")[0])
    program = Path(sys.executable).with_name("polygraphy")
    return subprocess.run([program, *command[1:]], capture_output=True).returncode


def engine(folder: Path, manifest, stage: str, precision: str) -> Path:
    variant = next(v for v in manifest.stages[stage] if v.precision == precision)
    return folder / next(iter(variant.files))


@pytest.mark.parametrize(
    ("stage", "precision", "recorded"),
    [("step", "fp16", True), ("accumulate", "fp32", True), ("decoder", "fp16", False)],
)
def test_a_stage_that_fails_is_shown_again_and_passes_when_it_is_put_right(
    half_engines, small_checkpoint, tmp_path, stage, precision, recorded
):
    sound, manifest = half_engines
    folder = tmp_path / "my engines"
    shutil.copytree(sound, folder)
    spoil(folder, stage, precision)
    before = engine(folder, manifest, stage, precision).read_bytes()
    source = [] if recorded else ["--checkpoint", small_checkpoint]
    options = ["--recorded"] if recorded else []
    result = run_nsp("verify", folder, f"--{precision}", "--json", *options, *source)
    check = next(c for c in json.loads(result.stdout)["stages"] if not c["passed"])
    assert check["stage"] == stage
    (made,) = tmp_path.glob(f"my engines-parity-{stage}-*")
    assert {path.name for path in made.iterdir()} >= {"model.onnx", "inputs.json", "outputs.json"}
    assert run(check["error"]) == 1
    for path in engine(sound, manifest, stage, precision).parent.iterdir():
        shutil.copyfile(path, made / path.name)
    assert run(check["error"]) == 0
    assert engine(folder, manifest, stage, precision).read_bytes() == before


def test_an_export_that_misses_a_gate_names_the_command(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(LIMITS, "fp32", replace(LIMITS["fp32"], psnr_db=300.0))
    folder = tmp_path / "engines"
    options = ExportOptions(
        checkpoint=str(small_checkpoint), engine_dir=str(folder), targets=("onnxruntime",)
    )
    with pytest.raises(
        ParityError, match=r"PSNR .*; to reproduce it, run: polygraphy run "
    ) as caught:
        run_export(options)
    assert "\n" not in str(caught.value)
    assert run(str(caught.value)) == 1
    assert not list(folder.glob(".export/decoder/*/*"))
    assert len(list(tmp_path.glob("engines-parity-decoder-*"))) == 1


def test_sound_engines_leave_nothing(half_engines, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(half_engines[0], folder)
    assert verify(folder, recorded=True).failure() is None
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def fail(backend: OnnxRuntimeBackend, x, **settings) -> None:
    allowed = partial(LIMITS["fp32"].allowed, RANGE)
    with reproducible(backend, "s", allowed=allowed, **settings) as watched:
        watched.run("s", {"x": watched.upload(x)})
        raise ParityError("tokens differ")


def test_an_error_that_no_output_shows_stays_as_it_is(tmp_path):
    from nsp.export.proof.recorded import Call
    from nsp.stage.io import Axes, StageIO

    io = StageIO(inputs={"x": Axes("B 4")}, outputs={"y": Axes("B 4")})
    model = write_model(tmp_path)
    backend = OnnxRuntimeBackend({"s": model}, {"s": io}, kv_layout="delta", providers=[CPU])
    x = np.ones((2, 4), np.float32)
    for expected, shown in ((x, False), (2 * x + x.cumsum(1), True)):
        call = Call(stage="s", feeds={"x": x}, outputs={"y": expected}, step=0)
        with pytest.raises(ParityError, match="tokens differ") as caught:
            fail(
                backend,
                x,
                calls=[replace(call, stage="other"), call],
                graph=model,
                folder=tmp_path / "engines",
            )
        assert ("polygraphy run" in str(caught.value)) == shown
    assert len(list(tmp_path.glob("engines-parity-s-*"))) == 1
