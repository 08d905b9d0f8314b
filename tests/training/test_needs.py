"""What a run lacks is told before its first phase."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import nsp.training.needs
from nsp.data.sources import ImageSource, Sample
from nsp.errors import ConfigError
from nsp.families.var.config import size, with_condition
from nsp.families.var.recipes import smoke
from nsp.family.classes import ClassCondition
from nsp.training.needs import check_classes, check_disk, free_memory
from nsp.training.whole_run import train


def pictures(*class_ids: int | None) -> ImageSource:
    """Return pictures of these classes."""
    samples = tuple(Sample(name=str(n), captions=(), class_id=c) for n, c in enumerate(class_ids))
    return ImageSource(samples, (), ())


def test_pictures_of_a_class_that_the_model_lacks_are_refused() -> None:
    config = with_condition(size("tiny"), ClassCondition(num_classes=3))
    check_classes(config, "class", pictures(0, 2, None))
    check_classes(config, "class", None)
    check_classes(size("tiny"), "prompt", pictures(7))
    with pytest.raises(ConfigError, match="have 8 classes, but the model has 3; set num_classes"):
        check_classes(config, "class", pictures(0, 7))


def test_pictures_without_a_class_are_a_warning_before_the_first_phase(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A tokenizer may learn from them, so they are not refused."""
    check_classes(
        with_condition(size("tiny"), ClassCondition(num_classes=3)), "class", pictures(0, 2, None)
    )
    check_classes(
        with_condition(size("tiny"), ClassCondition(num_classes=1)), "class", pictures(None)
    )
    (said,) = caplog.messages
    assert said.startswith("1 of 3 pictures have no class, but this is a model of 3 classes")


def test_saved_steps_that_do_not_fit_the_disk_are_refused(tmp_path: Path) -> None:
    check_disk(0, tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"need 1024\.00 PiB|need .* GiB, but {tmp_path} has"):
        check_disk(2**60, tmp_path / "run" / "deep")


def test_a_phase_larger_than_memory_is_one_warning_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nsp.training.needs, "_FEW_WEIGHTS", 0)
    monkeypatch.setattr(nsp.training.needs, "free_memory", lambda device: 2**20)
    phases = tuple(dataclasses.replace(phase, steps=1) for phase in smoke().phases)
    run: Any = dataclasses.replace(smoke(), phases=phases)
    with caplog.at_level(logging.WARNING, "nsp.training"):
        train(run, tmp_path / "run", last_phase="tokenizer", device="cpu")
    said = [each.message for each in caplog.records if "of memory" in each.message]
    assert len(said) == 1
    assert said[0].startswith("phase tokenizer needs about")
    assert "give a smaller --batch-size" in said[0]


def test_free_memory_is_that_of_the_machine_or_what_its_group_may_still_take(
    tmp_path: Path,
) -> None:
    cpu = torch.device("cpu")
    whole = free_memory(cpu, group=tmp_path / "none")
    assert whole is not None
    assert whole > 2**20
    (tmp_path / "memory.max").write_text("4096\n")
    (tmp_path / "memory.current").write_text("1024\n")
    assert free_memory(cpu, group=tmp_path) == 3072
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(cpu, group=tmp_path) != 3072
