"""state.pt: a full disk costs nothing that was saved, a bad file is named in one line."""

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsp.errors import CheckpointError
from nsp.training.config import RunConfig
from nsp.training.run import train
from nsp.training.state import read_state, write_state

ROOT = Path(__file__).parents[2]

LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from train import main
main()
"""


@pytest.fixture
def run(config: RunConfig, tmp_path: Path) -> Path:
    """A run folder after its first phase."""
    train(config, tmp_path / "run", last_phase="tokenizer")
    return tmp_path / "run"


def one_line(error: BaseException, path: Path) -> str:
    """Return the message after checking that it names the file and gives no dangerous advice."""
    message = str(error)
    assert str(path) in message
    assert "\n" not in message
    assert "weights_only" not in message
    return message


@pytest.mark.parametrize("kind", ["noise", "pickle", "zip", "tensor", "other", "empty"])
def test_a_bad_state_is_named_without_torchs_advice(
    config: RunConfig, run: Path, kind: str
) -> None:
    state = run / "tokenizer/state.pt"
    whole = state.read_bytes()
    if kind == "tensor":
        torch.save(torch.zeros(3), state)
    elif kind == "other":
        torch.save({"config": "{}", "step": "four"}, state)
    else:
        pickled = pickle.dumps(Path("x"))
        content = {"noise": b"\x12" * 5000, "pickle": pickled, "zip": whole[:-300], "empty": b""}
        state.write_bytes(content[kind])
    with pytest.raises(CheckpointError, match="damaged or was not written by") as caught:
        train(config, run, resume=True)
    one_line(caught.value, state)


def test_a_state_of_another_model_is_named(config: RunConfig, run: Path) -> None:
    path = run / "tokenizer/state.pt"
    _, state = read_state(path)
    state["trained"] = {name: tensor[..., None] for name, tensor in state["trained"].items()}
    write_state(path, state)
    with pytest.raises(CheckpointError, match="does not fit this model") as caught:
        train(config, run, resume=True)
    one_line(caught.value, path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 320 vs 256"),
    ],
)
def test_a_full_disk_leaves_the_state_saved_before(
    config: RunConfig, run: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = run / "tokenizer/state.pt"
    before, files = state.read_bytes(), sorted(state.parent.iterdir())

    def full(values: object, path: Path) -> None:
        path.write_bytes(b"part")
        raise error

    longer = tuple(dataclasses.replace(phase, steps=6) for phase in config.phases)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        train(dataclasses.replace(config, phases=longer), run, resume=True)
    one_line(caught.value, state)
    assert state.read_bytes() == before
    assert sorted(state.parent.iterdir()) == files


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_file_that_cannot_grow_is_one_line_and_exit_code_1(run: Path) -> None:
    """The kernel refuses to write, as on a full disk; torch's own writer is what fails."""
    state = run / "tokenizer/state.pt"
    before, files = state.read_bytes(), sorted(state.parent.iterdir())
    options = ["--resume", "--steps", "6", "--output-dir", str(run)]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(len(before) // 2), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {state} cannot be written")
    assert state.read_bytes() == before
    assert sorted(state.parent.iterdir()) == files
