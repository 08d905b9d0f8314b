"""The pipeline as users of diffusers call it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import nsp
from nsp.errors import ConfigError


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> nsp.Pipeline:
    return nsp.Pipeline.from_pretrained(tiny_checkpoint, device="cpu")


def test_a_call_gives_pictures_with_the_seeds_that_make_them_again(
    pipe: nsp.Pipeline, tmp_path: Path
) -> None:
    made = pipe("red apple", num_images_per_prompt=3, seed=5)
    assert made.seeds == (5, 6, 7)
    assert all(isinstance(each, Image.Image) for each in made.images)
    made.images[0].save(tmp_path / "x.png")
    for picture, seed in zip(made.images, made.seeds, strict=True):
        (again,) = pipe("red apple", seed=seed).images
        difference = np.asarray(again).astype(int) - np.asarray(picture)
        assert np.abs(difference).max() <= 1


def test_a_list_of_seeds_and_of_prompts_is_taken(pipe: nsp.Pipeline) -> None:
    made = pipe(["red apple", "smiling cat"], num_images_per_prompt=2, seed=[1, 2, 3, 4])
    assert made.seeds == (1, 2, 3, 4)
    with pytest.raises(ConfigError, match="seed has 2 numbers for 4 images"):
        pipe(["red apple", "smiling cat"], num_images_per_prompt=2, seed=[1, 2])


def test_output_types_are_pictures_arrays_and_latents(pipe: nsp.Pipeline) -> None:
    arrays = pipe("red apple", output_type="np", seed=2).images
    (picture,) = pipe("red apple", seed=2).images
    assert arrays.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(np.rint(arrays[0] * 255), np.asarray(picture))
    latents = pipe("red apple", output_type="latent", seed=2).images
    assert latents.shape == (1, 8, 4, 4)
    with pytest.raises(ConfigError, match="output_type 'jpeg' is not one of pil, np, latent"):
        pipe("red apple", output_type="jpeg")


def test_pictures_are_saved_several_with_numbers(pipe: nsp.Pipeline, tmp_path: Path) -> None:
    pipe("red apple").save(tmp_path / "one.png")
    pipe("red apple", num_images_per_prompt=2).save(str(tmp_path / "two.png"))
    names = {"one.png", "two_0.png", "two_1.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with pytest.raises(ConfigError, match='use output_type="pil"'):
        pipe("red apple", output_type="np").save(tmp_path / "x.png")
    with pytest.raises(ConfigError, match=r"x.shape cannot be saved .*; use .png"):
        pipe("red apple").save(tmp_path / "x.shape")
    with pytest.raises(OSError, match="nowhere"):
        pipe("red apple").save(tmp_path / "nowhere" / "x.png")


def test_the_callback_sees_every_step(pipe: nsp.Pipeline) -> None:
    seen: list[tuple[int, Any]] = []

    def look(found: Any, step: int, timestep: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert found is pipe
        seen.append((step, kwargs["latents"].shape))
        return kwargs

    pipe("red apple", callback_on_step_end=look)
    assert seen == [(step, (1, 8, 4, 4)) for step in range(4)]


def test_a_typo_is_named_with_what_this_call_takes(pipe: nsp.Pipeline) -> None:
    with pytest.raises(ConfigError, match=r"'guidence_scale', nearest is guidance_scale; known: p"):
        pipe("red apple", guidence_scale=2.0)
    with pytest.raises(ConfigError, match="'num_images', nearest is num_images_per_prompt"):
        pipe("red apple", num_images=2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer of at least 1"),
        ({"prompt": 1.5}, "prompt must be one or a list of several, not 1.5"),
        ({"prompt": None, "class_id": 1.5}, "class_id must be one or a list of several, not 1.5"),
    ],
)
def test_a_wrong_value_is_named_as_this_call_names_it(
    pipe: nsp.Pipeline, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        pipe(**{"prompt": "red apple", **wrong})


def test_negative_prompts_steer_guided_images(pipe: nsp.Pipeline) -> None:
    settings: dict[str, Any] = {"guidance_scale": 6.0, "guidance_schedule": "constant", "seed": 1}
    plain = pipe("red apple", output_type="np", **settings).images
    steered = pipe("red apple", negative_prompt="green apple", output_type="np", **settings).images
    assert np.abs(plain - steered).max() > 1e-3


def test_a_pipeline_and_its_output_say_what_they_are(pipe: nsp.Pipeline) -> None:
    assert repr(pipe).startswith("Pipeline(var ")
    assert "torch fp32, any batch" in repr(pipe)
    made = pipe("red apple")
    assert repr(made) == "PipelineOutput(1 images, seeds=[0])"
    png = made._repr_png_()
    assert png is not None
    assert png.startswith(b"\x89PNG")
    assert pipe("red apple", output_type="latent")._repr_png_() is None
