"""Loss, optimizer steps and schedules match the public trainer; see tests/goldens/var_tiny."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.families.var.model import NextScaleTransformer
from nsp.families.var.objective import decays, predictor_loss
from nsp.families.var.vqvae import VQVAE
from nsp.training.schedules import lr_ratio, weight_decay
from tests.goldens.var_tiny.fixtures import document, part, tensors, variant_config

CASES = document("train")["cases"]


@pytest.fixture(scope="module")
def vae(tiny_class_checkpoint: Path) -> VQVAE:
    loaded: VQVAE = read_checkpoint(tiny_class_checkpoint).load().vae
    return loaded


def new_model() -> NextScaleTransformer:
    model = NextScaleTransformer(variant_config("saln"))
    model.load_state_dict(part(tensors("var_variants"), "saln/weights/"))
    return model


def tokens(vae: VQVAE) -> torch.Tensor:
    return torch.cat(vae.tokenize(tensors("io")["vae/img"]), 1)


@pytest.mark.parametrize("name", sorted(CASES))
def test_losses_and_gradient_norms_match(vae: VQVAE, name: str) -> None:
    case, settings = CASES[name], document("train")["optimizer"]
    model = new_model()
    groups = [
        {"params": [model.get_parameter(n) for n in settings["decay"]], "weight_decay": 0.05},
        {"params": [model.get_parameter(n) for n in settings["no_decay"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=settings["betas"])
    labels = torch.tensor(document("train")["labels"])
    num_scales = None if case["prog_si"] < 0 else case["prog_si"] + 1
    for step, recorded in enumerate(case["steps"]):
        result = predictor_loss(
            model,
            vae.quantize,
            model.condition_on_class(labels),
            tokens(vae),
            label_smoothing=case["label_smooth"],
            num_scales=num_scales,
            newest_weight=case["prog_wp_per_step"][step],
        )
        optimizer.zero_grad()
        result["loss"].backward()
        if step == 0 and "grad_norm_per_param_first_step" in case:
            _check_gradients(model, case["grad_norm_per_param_first_step"])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
        optimizer.step()
        assert result["loss"].item() == pytest.approx(recorded["loss"], abs=1e-4)
        assert norm.item() == pytest.approx(recorded["grad_norm"], rel=1e-4)
    if name == "label_smooth":
        expected = tensors("train")
        names = dict(model.named_parameters())
        assert names.keys() <= {n.split("/")[-1] for n in expected} | expected.keys()
        for parameter_name, parameter in names.items():
            recorded = next(v for k, v in expected.items() if k.split("/")[-1] == parameter_name)
            torch.testing.assert_close(parameter.detach(), recorded, atol=1e-4, rtol=0)


def _check_gradients(model: NextScaleTransformer, recorded: dict[str, float]) -> None:
    for name, expected in recorded.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def test_weight_decay_groups_are_the_published_ones() -> None:
    settings = document("train")["optimizer"]
    decayed = {n for n, p in new_model().named_parameters() if decays(n, p)}
    assert decayed == set(settings["decay"])


def test_validation_metrics_match(vae: VQVAE, tiny_class_checkpoint: Path) -> None:
    recorded = document("train")["eval_main"]
    predictor = read_checkpoint(tiny_class_checkpoint).load().predictor
    labels = torch.tensor(document("train")["labels"])
    with torch.no_grad():
        result = predictor_loss(
            predictor, vae.quantize, predictor.condition_on_class(labels), tokens(vae)
        )
    assert result["ce"].item() == pytest.approx(recorded["L_mean"], abs=1e-4)
    assert result["ce_last"].item() == pytest.approx(recorded["L_tail"], abs=1e-4)
    assert result["accuracy"].item() == pytest.approx(recorded["acc_mean"], abs=1e-4)
    assert result["accuracy_last"].item() == pytest.approx(recorded["acc_tail"], abs=1e-4)


@pytest.mark.parametrize("case", document("schedules"), ids=lambda c: f"{c['sche']}-{c['max_it']}")
def test_schedules_match(case: dict[str, Any]) -> None:
    for step, lr, decay, half_lr, _ in case["rows"]:
        ratio = lr_ratio(
            step,
            case["max_it"],
            kind=case["sche"],
            warmup_steps=case["wp_it"],
            warmup_start=case["wp0"],
            end=case["wpe"],
        )
        assert case["peak_lr"] * ratio == pytest.approx(lr, rel=1e-9)
        assert case["peak_lr"] * ratio / 2 == pytest.approx(half_lr, rel=1e-9)
        actual = weight_decay(step, case["max_it"], start=case["wd"], end=case["wd_end"])
        assert actual == pytest.approx(decay, rel=1e-9)
