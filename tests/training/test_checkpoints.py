"""Saved steps: whole or not there, the last few and the best, a damaged one passed over."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsp.errors import CheckpointError
from nsp.family.recipe import PhaseConfig, RunConfig
from nsp.family.recipes import preset
from nsp.training.checkpoints import CheckpointStore
from nsp.training.whole_run import train

ROOT = Path(__file__).parents[2]
PHASE: PhaseConfig = preset("smoke").phases[0]

LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from nsp.console.train_command import main
main()
"""


def store(folder: Path, losses: list[float | None], *, keep_last: int = 2) -> CheckpointStore:
    """Return a store after saving steps 1, 2, 3 ... with these losses."""
    made = CheckpointStore(folder, keep_last=keep_last)
    for step, loss in enumerate(losses, start=1):
        state = {"step": step, "weights": torch.full((5,), float(step))}
        made.save(step, state, config=PHASE, loss=loss)
    return made


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step")) for path in folder.iterdir())


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    store(tmp_path, [3.0, 1.0, None, 2.0, 2.5, 2.2])
    assert steps(tmp_path) == [2, 5, 6]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    found = store(tmp_path, [1.0, 2.0]).load()
    assert found is not None
    saved, state = found
    assert (saved.step, saved.config, saved.loss) == (2, PHASE, 2.0)
    assert torch.equal(state["weights"], torch.full((5,), 2.0))
    assert CheckpointStore(tmp_path / "none", keep_last=1).load() is None


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    saved = store(tmp_path, [1.0])
    (tmp_path / ".step00000002.abcdefgh").mkdir()
    (tmp_path / ".step00000002.abcdefgh/state.pt").write_bytes(b"half")
    saved.save(2, {"step": 2}, config=PHASE, loss=None)
    assert steps(tmp_path) == [1, 2]
    assert saved.num_bytes() == sum(file.stat().st_size for file in tmp_path.glob("*/*"))


@pytest.mark.parametrize("kind", ["truncated", "noise", "pickle", "missing", "about"])
def test_a_damaged_step_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = store(tmp_path, [1.0, 2.0])
    state = tmp_path / "step00000002/state.pt"
    if kind == "missing":
        state.unlink()
    elif kind == "about":
        (state.parent / "about.json").write_text("{")
    else:
        content = {
            "truncated": state.read_bytes()[:-20],
            "noise": b"x",
            "pickle": pickle.dumps(1),
        }
        state.write_bytes(content[kind])
    found = made.load()
    assert found is not None
    assert found[0].step == 1
    assert "step00000002" in caplog.text
    assert "using the step saved before it" in caplog.text
    assert "weights_only" not in caplog.text


def test_code_in_a_saved_step_is_not_run(tmp_path: Path) -> None:
    from nsp.files import file_sha256

    made = store(tmp_path, [1.0])
    state = tmp_path / "step00000001/state.pt"
    state.write_bytes(pickle.dumps(Path("x")))
    about = json.loads((state.parent / "about.json").read_text())
    (state.parent / "about.json").write_text(json.dumps({**about, "sha256": file_sha256(state)}))
    with pytest.raises(CheckpointError, match="all 1 are damaged") as caught:
        made.load()
    assert "\n" not in str(caught.value)


def test_a_half_removed_step_is_passed_over(tmp_path: Path) -> None:
    made = store(tmp_path, [1.0, 2.0])
    (tmp_path / ".step00000009.gone").mkdir()
    (tmp_path / ".step00000008.abc").mkdir()
    found = made.load()
    assert found is not None
    assert found[0].step == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 320 vs 256"),
    ],
)
def test_a_full_disk_leaves_the_steps_saved_before(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store(tmp_path, [1.0])

    def full(values: object, path: Path) -> None:
        path.write_bytes(b"part")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot be written.*free some space") as caught:
        made.save(2, {"step": 2}, config=PHASE, loss=None)
    assert str(tmp_path / "step00000002") in str(caught.value)
    assert steps(tmp_path) == [1]


@pytest.fixture
def run(config: RunConfig, tmp_path: Path) -> Path:
    """A run folder after its first phase."""
    train(config, tmp_path / "run", last_phase="tokenizer")
    return tmp_path / "run"


def longer(config: RunConfig) -> RunConfig:
    phases = tuple(dataclasses.replace(phase, steps=6) for phase in config.phases)
    return dataclasses.replace(config, phases=phases)


def test_a_state_of_another_model_is_named(config: RunConfig, run: Path) -> None:
    made = CheckpointStore(run / "tokenizer/checkpoints", keep_last=2)
    found = made.load()
    assert found is not None
    saved, state = found
    state["trained"] = {name: tensor[..., None] for name, tensor in state["trained"].items()}
    made.save(saved.step, state, config=saved.config, loss=None)
    with pytest.raises(CheckpointError, match="does not fit this model") as caught:
        train(longer(config), run, resume=True)
    assert str(saved.state_file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_whose_newest_step_is_damaged_ends_as_an_undamaged_one(
    config: RunConfig, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run, tmp_path / "other")
    state = run / "tokenizer/checkpoints/step00000004/state.pt"
    os.truncate(state, 1000)
    config = longer(config)
    last = [
        train(config, folder, last_phase="tokenizer", resume=True).checkpoint
        / "vae/model.safetensors"
        for folder in (run, tmp_path / "other")
    ]
    assert "is truncated or damaged" in caplog.text
    assert last[0].stat().st_size == last[1].stat().st_size  # the schedules differ with the steps


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_file_that_cannot_grow_is_one_line_and_exit_code_1(run: Path) -> None:
    """The kernel refuses to write, as on a full disk; torch's own writer is what fails."""
    saved = run / "tokenizer/checkpoints/step00000004"
    size = (saved / "state.pt").stat().st_size
    before = sorted(saved.parent.iterdir())
    options = ["--resume", "--steps", "6", "--output-dir", str(run)]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(size // 2), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert sorted(saved.parent.iterdir()) == before
