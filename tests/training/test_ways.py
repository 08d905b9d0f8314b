"""Other ways to compute a run: micro-batches, recomputation, compilation, adapters."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.errors import ConfigError
from nsp.family.recipe import LoraConfig, RunConfig
from nsp.family.recipes import preset
from nsp.pipeline.pipeline import load_pipeline
from nsp.training.data_order import Share
from nsp.training.state import TrainingState
from nsp.training.trainer import Phase
from nsp.training.whole_run import speak_less, train


def with_phases(config: RunConfig, **changes: Any) -> RunConfig:
    phases = tuple(replace(phase, **changes) for phase in config.phases)
    return replace(config, phases=phases)


def losses(folder: Path) -> list[float]:
    logs = [folder / phase / "log.jsonl" for phase in ("tokenizer", "predictor")]
    return [json.loads(line)["loss"] for log in logs for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = preset("smoke")
    run = replace(run, data=replace(run.data, source=str(pictures)))
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(run, folder)
    return folder


def test_recomputed_activations_change_nothing(
    config: RunConfig, plain: Path, tmp_path: Path
) -> None:
    train(replace(config, activation_checkpointing=True), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=2e-5)


# torch's own compiler uses what torch deprecates, and looks at .grad of every input.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_predictor_has_the_losses_of_a_plain_one(
    config: RunConfig,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    phases = tuple(phase for phase in config.phases if phase.name == "predictor")
    run = replace(config, phases=phases, start_from=str(plain / "start"))
    train(run, tmp_path / "plain")
    compile_unit = torch.nn.Module.compile
    # Without generating C++: 45 s less, and how units are compiled is what is tested here.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda unit: compile_unit(unit, backend="aot_eager")
    )
    with caplog.at_level(logging.INFO):
        train(replace(run, compile=True), tmp_path / "run")
    assert "the first steps are slow, for the model is compiled in them" in caplog.text
    first, second = (
        [json.loads(line)["loss"] for line in log.read_text().splitlines()]
        for log in (tmp_path / name / "predictor/log.jsonl" for name in ("plain", "run"))
    )
    assert second == pytest.approx(first, rel=2e-5)


def test_a_run_that_leaves_compiling_open_does_not_compile_on_a_processor(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(unit: torch.nn.Module) -> None:
        raise AssertionError("a unit is compiled")

    monkeypatch.setattr(torch.nn.Module, "compile", refuse)
    made = train(replace(config, compile=None), tmp_path / "run", device="cpu")
    assert made.run.compile is False


def test_bf16_trains_close_to_fp32(config: RunConfig, plain: Path, tmp_path: Path) -> None:
    """In a process of its own: accelerate keeps one precision for the life of a process."""
    source = config.data.source
    words = ["train.py", "--preset", "smoke", "--data", source, "--precision", "bf16"]
    done = subprocess.run(
        [sys.executable, *words, "--output-dir", str(tmp_path / "run")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert " in bf16, " in done.stderr
    first, second = losses(plain), losses(tmp_path / "run")
    assert second == pytest.approx(first, rel=0.03)
    assert second != first


def test_micro_batches_add_up_to_the_batch(config: RunConfig, plain: Path, tmp_path: Path) -> None:
    train(with_phases(config, accumulate=4), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=2e-5)


@pytest.fixture
def adapted(config: RunConfig, plain: Path) -> RunConfig:
    """A run that starts from the plain one's model and trains adapters in its predictor."""
    lora = LoraConfig(rank=2, targets=("mat_qkv", "fc1"))
    phases = tuple(
        replace(phase, lora=lora, ema_decay=0.0)
        for phase in config.phases
        if phase.name == "predictor"
    )
    return replace(config, phases=phases, start_from=str(plain / "checkpoint"))


def test_adapters_are_saved_merged(adapted: RunConfig, plain: Path, tmp_path: Path) -> None:
    result = train(adapted, tmp_path / "run")
    before, after = (
        load_file(folder / "predictor/model.safetensors")
        for folder in (plain / "checkpoint", result.checkpoint)
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("attn.mat_qkv", "ffn.fc1")
    }
    for name in changed:
        update = (after[name] - before[name]).float()
        assert torch.linalg.matrix_rank(update, rtol=1e-3) <= 2
    assert load_pipeline(result.checkpoint).generate(prompts=["colour number 3"]).images.any()
    assert read_checkpoint(result.checkpoint).notes["steps"]["predictor"] == 4


def test_an_adapted_run_resumes_exactly(adapted: RunConfig, tmp_path: Path) -> None:
    whole = train(adapted, tmp_path / "whole").checkpoint
    train(adapted, tmp_path / "parts")
    newest = tmp_path / "parts/predictor/checkpoints/step00000004"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()  # as if killed after step 2
    notes = tmp_path / "parts/checkpoint/config.json"
    record = json.loads(notes.read_text())
    record["notes"]["steps"]["predictor"] = 2
    notes.write_text(json.dumps(record))
    parts = train(adapted, tmp_path / "parts", resume=True).checkpoint
    first, second = (load_file(f / "predictor/model.safetensors") for f in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_adapter_for_a_layer_that_is_not_there_is_refused(
    adapted: RunConfig, tmp_path: Path
) -> None:
    run = with_phases(adapted, lora=LoraConfig(targets=("query",)))
    with pytest.raises(ConfigError, match=r"'query' is not a linear layer .*mat_qkv"):
        train(run, tmp_path / "run")


def test_starting_from_another_kind_of_model_is_refused(
    config: RunConfig, plain: Path, tmp_path: Path
) -> None:
    model = {**config.model, "patch_nums": [1, 2, 4]}
    run = replace(config, model=model, start_from=str(plain / "checkpoint"))
    with pytest.raises(ConfigError, match=r"has patch_nums.* this run's model"):
        train(run, tmp_path / "run")


def test_starting_from_a_checkpoint_of_another_family_is_refused(
    config: RunConfig, plain: Path, tmp_path: Path
) -> None:
    other = preset("next_scale_smoke")
    run = replace(other, data=config.data, start_from=str(plain / "checkpoint"))
    with pytest.raises(ConfigError, match="is of family var, but this run is of next_scale"):
        train(run, tmp_path / "run")


def test_a_batch_that_cannot_be_cut_fails_before_the_first_step(
    config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="choose a multiple of 3"):
        train(with_phases(config, accumulate=3), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"accumulate": 3}, "choose a multiple of 3"),
        ({"batch_size": 16}, "batch_size=16 exceeds the 12 pictures"),
        ({"objective": {"label_smoting": 0.1}}, "unknown key 'label_smoting'"),
        ({"name": "pred"}, "unknown phase 'pred' of family var"),
        ({"lora": LoraConfig(targets=("query",))}, "'query' is not a linear layer"),
    ],
)
def test_what_is_wrong_with_a_later_phase_is_said_before_the_first_step(
    config: RunConfig, tmp_path: Path, changes: dict[str, Any], refusal: str
) -> None:
    tokenizer, predictor = config.phases
    run = replace(config, phases=(tokenizer, replace(predictor, **changes)))
    with pytest.raises(ConfigError, match=refusal):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_negative_number_of_workers_is_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="num_workers must be at least 0"):
        replace(config.data, num_workers=-1)


def test_fewer_held_out_pictures_than_processes_are_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    phase: Any = SimpleNamespace(share=Share(batch_size=2, world_size=2))
    one: Any = TensorDataset(torch.zeros(1))
    two: Any = TensorDataset(torch.zeros(2))
    assert Phase._enough(phase, two) is two
    assert Phase._enough(phase, one) is None
    assert "1 held-out pictures are too few for 2 processes" in caplog.text


def test_the_gradient_scaler_of_a_phase_does_not_depend_on_the_phase_before(
    config: RunConfig,
) -> None:
    """A run resumed at the start of the phase has a new one."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    used, new = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    used.load_state_dict({**used.state_dict(), "scale": 8.0, "_growth_tracker": 7})
    TrainingState(config.phases[0], model, optimizer, used)
    assert used.state_dict() == new.state_dict()


def test_every_process_names_the_bad_files_that_it_alone_meets() -> None:
    loggers = [logging.getLogger(name) for name in ("nsp", "nsp.data.stream")]
    levels = [each.level for each in loggers]
    try:
        speak_less()
        assert not logging.getLogger("nsp.training.whole_run").isEnabledFor(logging.WARNING)
        assert logging.getLogger("nsp.data.stream").isEnabledFor(logging.WARNING)
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def test_no_space_for_the_saved_steps_fails_before_the_first_step(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match="saved steps need"):
        train(config, tmp_path / "run")
