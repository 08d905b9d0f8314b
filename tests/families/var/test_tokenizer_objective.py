"""Codes nobody uses move onto latents, until the phase nears its end."""

import dataclasses
import json
from pathlib import Path

from nsp.training.presets import preset
from nsp.training.run import train
from tests.training.pictures import write_pictures


def test_codes_are_left_alone_after_the_stated_fraction(tmp_path: Path) -> None:
    run = preset("smoke")
    tokenizer = dataclasses.replace(
        run.phases[0], objective={"restart_every": 1, "restart_until": 0.5, "restart_share": 1.0}
    )
    data = dataclasses.replace(run.data, source=str(write_pictures(tmp_path / "pictures")))
    run = dataclasses.replace(run, phases=(tokenizer, run.phases[1]), data=data)
    train(run, tmp_path / "run", last_phase="tokenizer")
    log = (tmp_path / "run/tokenizer/log.jsonl").read_text().splitlines()
    moved = [row.get("codes_restarted") for row in map(json.loads, log) if "lr" in row]
    assert [count is None for count in moved] == [False, False, True, True]
    assert moved[0] > 0
