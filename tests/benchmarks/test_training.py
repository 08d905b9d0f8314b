"""The trainer's steps and a plain loop's are measured in turn."""

import dataclasses
from pathlib import Path

from nsp.benchmarks.rates.training import measure
from nsp.family.recipes import preset
from tests.training.pictures import write_pictures


def test_both_loops_are_timed_step_by_step(tmp_path: Path) -> None:
    run = preset("smoke")
    data = dataclasses.replace(run.data, source=str(write_pictures(tmp_path / "data")))
    run = dataclasses.replace(run, data=data)
    never = dict.fromkeys(("sample_every", "checkpoint_every", "validate_every"), 10**6)
    config = dataclasses.replace(run.phases[1], steps=10**4, **never)
    found = measure(run, config, steps=4)
    assert {name: len(times) for name, times in found.step_ms.items()} == {
        "trainer": 3,
        "plain": 3,
    }
    assert all(ms > 0 for times in found.step_ms.values() for ms in times)
    assert found.overhead == found.ratio_median - 1
    busy = dataclasses.replace(found, trusted=False, warnings=("others work",))
    assert "not trusted: others work" in busy.words
    assert "%" not in busy.words
