"""Pictures that an order may have: to change, to change in a part, to follow."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nsp.data.dataset import ImageDataset
from nsp.data.sources import ImageSource, Sample
from nsp.errors import ConfigError
from nsp.families.inl_diffusion.learn import InlLearner
from nsp.families.inl_diffusion.loop import CONTROL, INIT, MASK
from nsp.families.inl_diffusion.sampling import InlSampling
from nsp.family.objective import TrainingData
from nsp.family.order import Order
from nsp.family.registry import family
from nsp.pipeline.pipeline import Pipeline, torch_pipeline
from nsp.text.parts import TextEncoderSettings
from tests.families.inl_diffusion.models import TINY, new_system, with_control

_SIDE = 8
_FEW = InlSampling(num_inference_steps=4, guidance_scale=2.0)
_RNG = np.random.default_rng(0)
_PICTURE = _RNG.random((3, _SIDE, _SIDE), np.float32)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return torch_pipeline(family("inl_diffusion"), new_system(), device="cpu")


def _latent(pipe: Pipeline, given: Mapping[str, NDArray[Any]], **settings: Any) -> NDArray[Any]:
    order = Order("red apple", 3, _FEW.changed(settings), given=given)
    return pipe.trace([order]).latents[-1]


def _encoded(pipe: Pipeline) -> NDArray[Any]:
    backend = pipe.backend
    image = backend.upload(_PICTURE[None])
    return backend.download(backend.run("encoder", {"image": image})["latent"])


def test_less_strength_keeps_more_of_the_picture(pipe: Pipeline) -> None:
    kept = _encoded(pipe)
    errors = [
        np.abs(_latent(pipe, {INIT: _PICTURE}, strength=strength) - kept).mean()
        for strength in (0.25, 0.5, 1.0)
    ]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1] / 2


def test_outside_of_the_mask_the_picture_is_kept(pipe: Pipeline) -> None:
    mask = np.zeros((_SIDE, _SIDE), np.float32)
    mask[: _SIDE // 2] = 1
    found, kept = _latent(pipe, {INIT: _PICTURE, MASK: mask}), _encoded(pipe)
    half = found.shape[2] // 2
    assert np.allclose(found[:, :, half:], kept[:, :, half:], atol=1e-5)
    assert not np.allclose(found[:, :, :half], kept[:, :, :half], atol=1e-2)


@pytest.mark.parametrize(
    ("given", "settings", "said"),
    [
        ({MASK: np.ones((_SIDE, _SIDE), np.float32)}, {}, "mask_image says what of init_image"),
        ({}, {"strength": 0.5}, "strength=0.5 says how much of init_image to change"),
        ({INIT: np.ones((3, 4, 4), np.float32)}, {}, r"init_image is float32 \(3, 4, 4\)"),
        ({INIT: _PICTURE * 3}, {}, r"init_image must be in \[0, 1"),
        ({CONTROL: _PICTURE}, {}, "this model has no control: omit control_image"),
    ],
)
def test_a_wrong_picture_is_one_clear_line(
    pipe: Pipeline, given: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        _latent(pipe, given, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strength": 0.0}, "strength must be above 0"),
        ({"strength": 1.5}, "strength must be a number from 0 to 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be at most 1000"),
        ({"sampler": "dmpp_2m"}, "nearest is dpmpp_2m"),
        ({"guidance_start": 0.6, "guidance_end": 0.5}, "guidance_start=0.6 must be below"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _FEW.changed(settings)


def test_an_untrained_control_changes_no_bit() -> None:
    base = new_system()
    plain = torch_pipeline(family("inl_diffusion"), base, device="cpu")
    controlled = torch_pipeline(family("inl_diffusion"), with_control(base), device="cpu")
    expected = _latent(plain, {})
    assert np.array_equal(_latent(controlled, {CONTROL: _PICTURE}), expected)


def test_a_control_that_learnt_something_changes_the_picture() -> None:
    system = with_control(new_system())
    with torch.no_grad():
        system.dit.control.patch_embed.proj.weight.normal_()
        system.dit.control.outputs[0].weight.normal_()
    pipe = torch_pipeline(family("inl_diffusion"), system, device="cpu")
    one, other = (_latent(pipe, {CONTROL: each}) for each in (_PICTURE, 1 - _PICTURE))
    assert not np.allclose(one, other, atol=1e-3)
    with pytest.raises(ConfigError, match="follows a control picture: give control_image"):
        _latent(pipe, {})


def test_one_model_makes_pictures_of_its_sizes() -> None:
    config = dataclasses.replace(TINY, other_sides=(8,))
    pipe = torch_pipeline(family("inl_diffusion"), new_system(config), device="cpu")
    orders = [Order("red apple", 3, _FEW.changed({"size": size})) for size in (8, 16, None)]
    sides = [pipe.trace([order]).image.shape[-1] for order in orders]
    assert sides == [8, 16, 8]
    with pytest.raises(ConfigError, match="this model makes pictures of 16, 8 px"):
        pipe.trace([Order("red apple", 3, _FEW.changed({"size": 12}))])
    other = Order("red apple", 3, _FEW.changed({"size": 16}), given={INIT: _PICTURE})
    with pytest.raises(ConfigError, match="init_image is for pictures of 8 px; omit size"):
        pipe.trace([other])


def test_every_step_tells_how_much_each_patch_is_refined(pipe: Pipeline) -> None:
    steps = list(pipe.stream(prompts=["red apple", "pear"], num_inference_steps=3))
    maps = np.stack([step.result("gate") for step in steps])
    assert maps.shape == (3, 2, 2, 2)
    assert ((maps > 0) & (maps < 1)).all()
    assert maps.std() > 0
    with pytest.raises(ConfigError, match=r'has no tokens in this step; .* or result\("gate"\)'):
        _ = steps[0].tokens


def test_a_new_control_has_no_effect_and_is_not_trained_without_pictures() -> None:
    config = dataclasses.replace(TINY, control_depth=1)
    samples = (Sample(name="pear", captions=("pear",), class_id=None),)
    source = ImageSource(samples, (), ())
    encoder = TextEncoderSettings(vocab_size=560, depth=1, num_heads=2)
    system = InlLearner().new_system(config, encoder, source)
    control = system.dit.control
    assert not any(
        each.any() for part in (control.outputs, control.patch_embed) for each in part.parameters()
    )
    own, trained = (part.blocks[0].state_dict() for part in (control, system.dit))
    assert all(torch.equal(own[name], trained[name]) for name in trained)
    data = TrainingData(ImageDataset(source, 8, train=True, crop=False))
    with pytest.raises(ConfigError, match="a control cannot be trained yet"):
        InlLearner().objective("dit", {}, system, data)
