"""Engines of one batch size pass the checks of other batches, of which the rest is padding."""

from pathlib import Path
from typing import Any

import pytest

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.errors import ProfileError
from nsp.export.options import ExportOptions
from nsp.export.plan import make_plan
from nsp.export.proof.parity import Subject, check_stage
from nsp.export.proof.reference import Reference, record_reference
from nsp.export.store import EngineStore
from tests.backends.machine import Machine
from tests.families.next_scale.models import new_tiny_checkpoint


def static_engines(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *, max_batch: int
) -> tuple[Machine, Reference]:
    """Return engines for full batches on the stand-in, and what PyTorch makes of all examples."""
    options = ExportOptions(
        checkpoint=str(checkpoint), engine_dir=str(folder / "out"), targets=("onnxruntime",)
    )
    plan = make_plan(options, EngineStore(folder / "out"))
    record = read_checkpoint(checkpoint)
    system = record.load()
    machine = Machine(system, folder, monkeypatch, name=record.family.name)
    machine.write_plans(max_batch=max_batch, static_batch=True)
    return machine, record_reference(plan, system)


def check(machine: Machine, reference: Reference, stage: str) -> dict[str, Any]:
    declared = machine.family.stages(machine.config, kv_layout="delta", dtype="float32")[stage]
    subject = Subject(
        stage=stage,
        io=declared.io,
        gate=declared.gate,
        backend=machine.load().backend,
        precision="fp32",
        label=stage,
    )
    return check_stage(subject, [batch.recording for batch in reference.batches])


@pytest.mark.parametrize("family", ["var", "next_scale"])
def test_every_stage_passes_with_smaller_and_unguided_batches(
    family: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint if family == "var" else new_tiny_checkpoint(tmp_path / "checkpoint")
    machine, reference = static_engines(tmp_path, folder, monkeypatch, max_batch=9)
    assert {len(batch.orders) for batch in reference.batches} <= set(range(1, 9))
    for stage in machine.stages_io:
        found = check(machine, reference, stage)
        assert found["calls"]


def test_a_batch_that_is_too_large_is_refused_by_the_engines(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, reference = static_engines(tmp_path, tiny_checkpoint, monkeypatch, max_batch=2)
    with pytest.raises(ProfileError, match="condition"):
        check(machine, reference, "condition")
