"""Training makes the public trainer's steps: its schedule, optimizer, levels of patches."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from nsp.data.dataset import ImageDataset
from nsp.data.sources import open_source
from nsp.errors import CheckpointError, ConfigError
from nsp.families.next_patch.recipes import imagenet
from nsp.families.next_patch.system import NextPatchSystem
from nsp.family.objective import TrainingData
from nsp.family.recipe import OptimizerConfig, PhaseConfig, counted
from nsp.family.recipes import recipes
from nsp.raster.predictor_phase import PredictorObjective, PredictorSettings
from nsp.train import main
from nsp.training.checkpoints import CheckpointStore
from nsp.training.optimizer import new_optimizer, set_rates
from tests.families.next_patch.models import golden
from tests.goldens.llamagen_tiny.fixtures import config, tensors, weights

IO = tensors()


def phase(epochs: int, level: int, rate: float, pictures: int, batch_size: int) -> PhaseConfig:
    """Return the recipe's phase for a set of so many pictures."""
    run = imagenet(
        vq_ckpt=Path("vq.pt"), patch_level=level, epoch_rate=rate, epochs=epochs, scheduler=True
    )
    return dataclasses.replace(run.phases[0], batch_size=batch_size).in_steps(pictures)


@pytest.mark.parametrize("name", config()["schedule"])
def test_levels_and_rates_are_the_public_ones(name: str) -> None:
    case = config()["schedule"][name]
    made = phase(case["epochs"], case["patch_level"], case["epoch_rate"], 10, 1)
    settings, steps = PredictorSettings.from_dict(made.objective), counted(made.steps)
    parameters = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": parameters.parameters(), "decayed": True}])
    found, sides = [], []
    for step in range(steps):
        level = settings.level_at(step, steps, case["steps_per_epoch"])
        sides.append(level.side)
        found.append(set_rates(optimizer, made.optimizer, step - level.first, level.steps))
    expected = IO[f"schedule.{name}.multiplier"].numpy()
    np.testing.assert_allclose(np.array(found) / case["base_lr"], expected, atol=1e-12)
    ends = [end * case["steps_per_epoch"] for end in case["phase_end_epochs"]]
    assert [sides[end - 1] ** 2 for end in ends] == case["tokens_per_patch"]
    assert [sides[end] ** 2 for end in ends[:-1]] == case["tokens_per_patch"][1:]


def new_model(cond_drop_rate: float = 0.0) -> NextPatchSystem:
    """Return a model with the golden weights that learns without chance."""
    source = golden()
    off = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
    gpt = dataclasses.replace(source.config.gpt, cond_drop_rate=cond_drop_rate, **off)
    system = NextPatchSystem(dataclasses.replace(source.config, gpt=gpt))
    system.load_state_dict(source.state_dict())
    return system


def pictures(folder: Path, count: int) -> ImageDataset:
    for index in range(count):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(folder / f"{index:02}.png")
    return ImageDataset(open_source(folder), 32, train=True, crop=False)


def test_twenty_four_steps_end_where_the_public_trainer_does(tmp_path: Path) -> None:
    about = config()["train_run"]
    made = phase(about["epochs"], about["patch_level"], about["epoch_rate"], 16, about["batch"])
    optimizing = dataclasses.replace(made.optimizer, lr=about["base_lr"])
    assert isinstance(optimizing, OptimizerConfig)
    system = new_model()
    data = TrainingData(pictures(tmp_path, 16), batch_size=about["batch"])
    objective = PredictorObjective(system, data, PredictorSettings.from_dict(made.objective))
    objective.train()
    optimizer, steps = new_optimizer(objective, optimizing), counted(made.steps)
    losses, norms, rates = [], [], []
    for step in range(steps):
        first, length = objective.span(step, steps)
        rates.append(set_rates(optimizer, optimizing, step - first, length))
        objective.before_step(step, steps)
        assert objective.settings.level_at(step, steps, 4).side == int(IO["train.p_per_step"][step])
        place = step % about["steps_per_epoch"]
        loss = objective(
            {
                "key": torch.zeros(about["batch"], dtype=torch.int64),
                "condition": IO["train.labels"][place],
                "tokens": IO["train.codes"][place],
            }
        )["loss"]
        loss.backward()
        parameters = [*objective.trained.parameters()]
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, optimizing.grad_clip))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    np.testing.assert_allclose(rates, IO["train.lrs"], atol=1e-12)
    torch.testing.assert_close(torch.stack(losses), IO["train.losses"], atol=2e-4, rtol=0)
    torch.testing.assert_close(
        torch.stack(norms), IO["train.grad_norms_preclip"], atol=0, rtol=1e-3
    )
    for name in ("layers.0.attention.wqkv.weight", "norm.weight"):
        expected = IO[f"train.final.{name}"]
        found = system.gpt.get_parameter(name)[: len(expected)]
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_options_have_the_public_names(tmp_path: Path) -> None:
    line = "--preset next_patch --data-path d --vq-ckpt vq.pt --gpt-ckpt gpt.pt --gpt-model GPT-L"
    line += " --image-size 384 --patch-level 4 --epoch-rate 0.67 --epochs 30 --scheduler"
    line += " --cloud-save-path far --no-compile --print-config"
    result = CliRunner().invoke(main, line.split())
    run = yaml.safe_load(result.stdout)
    assert (run["model"]["grid_side"], run["model"]["gpt"]["depth"]) == (24, 24)
    assert (run["model"]["pretrained_vq"], run["model"]["pretrained_gpt"]) == ("vq.pt", "gpt.pt")
    assert (run["data"]["source"], run["copy_dir"], run["compile"]) == ("d", "far", False)
    given = CliRunner().invoke(main, line.replace("--no-compile", "--compile").split())
    usual = CliRunner().invoke(main, line.replace("--no-compile ", "").split())
    found = [yaml.safe_load(each.stdout)["compile"] for each in (given, usual)]
    assert found == [True, None]  # None: on a GPU alone
    (made,) = run["phases"]
    assert made["objective"] == {"patch_level": 4, "epoch_rate": 0.67, "rates_per_level": True}
    assert (made["epochs"], made["optimizer"]["warmup_steps"]) == (30, {"epochs": 1})


@pytest.mark.parametrize("rate", ["0", "1"])
def test_an_epoch_rate_that_leaves_a_level_without_epochs_is_refused(rate: str) -> None:
    line = ["--preset", "next_patch_emoji", "--epoch-rate", rate, "--print-config"]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 2
    assert "is not in the range 0<x<1" in result.output
    made = recipes()["next_patch_emoji"]
    with pytest.raises(ConfigError, match="--epoch-rate must be a number between 0 and 1, not"):
        made.run(epoch_rate=float(rate))


def test_a_second_copy_of_every_saved_step_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, far = phase(1, 1, 0.5, 10, 1), tmp_path / "far"
    store = CheckpointStore(tmp_path / "near", keep_last=1, copy=far)
    for step in (1, 2):
        store.save(step, {"step": step}, config=made, loss=None)
    assert [each.name for each in sorted(far.iterdir())] == ["step00000001", "step00000002"]
    found = CheckpointStore(far, keep_last=1).load()
    assert found is not None
    assert found[0].step == 2
    (tmp_path / "file").touch()
    store.copy = tmp_path / "file"
    store.save(3, {"step": 3}, config=made, loss=None)
    assert "no second copy" in caplog.text
    assert (tmp_path / "near" / "step00000003").is_dir()


def test_a_run_without_a_trained_tokenizer_begins_with_one() -> None:
    assert [each.name for each in imagenet().phases] == ["tokenizer", "predictor"]
    assert [each.name for each in imagenet(start_from="model").phases] == ["predictor"]
    assert imagenet(vq_ckpt=Path("vq.pt"), code_path="codes").data.source == "codes"
    with pytest.raises(ConfigError, match="--code-path codes and --data-path pictures: a run"):
        imagenet(code_path="codes", data_path="pictures")
    with pytest.raises(ConfigError, match="--image-size 250 and --downsample-size 16"):
        imagenet(vq_ckpt=Path("vq.pt"), image_size=250)


def test_a_new_model_begins_with_the_weights_given(tmp_path: Path) -> None:
    source = golden()
    start = dataclasses.replace(
        source.config, pretrained_vq=str(weights("vq")), pretrained_gpt=str(weights("gpt"))
    )
    from nsp.families.next_patch.learn import NextPatchLearner
    from nsp.text.parts import TextEncoderSettings

    made = NextPatchLearner().new_system(start, TextEncoderSettings(), None)
    assert made.config == source.config
    for name, tensor in source.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name
    wrong = dataclasses.replace(start, pretrained_vq=str(weights("gpt")))
    with pytest.raises(CheckpointError, match="give it with --predictor"):
        NextPatchLearner().new_system(wrong, TextEncoderSettings(), None)
