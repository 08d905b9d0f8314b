"""Pictures without a prompt need no text encoder, whatever the model is."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nsp.cli import main
from nsp.errors import ConfigError
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from tests.families.latent_gpt.models import UNCONDITIONAL, new_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(tmp_path_factory.mktemp("latent_gpt") / "model")


@pytest.fixture
def pipeline(checkpoint: Path) -> Pipeline:
    return load_pipeline(checkpoint, device="cpu")


def test_no_prompt_is_drawn_as_the_null_prompt_without_the_encoder(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = pipeline.generate(prompts=["red apple"], seed=3, guidance_scale=0.0, trace=True)
    run = pipeline.backend.run

    def without_encoder(stage: str, *arguments: object) -> object:
        assert stage != "text_encoder"
        return run(stage, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline.backend, "run", without_encoder)
    alone = pipeline.generate(seed=3, trace=True)
    assert encoded.trace is not None  # guidance 0 leaves the null branch alone
    assert alone.trace is not None
    np.testing.assert_allclose(alone.trace.logits[0], encoded.trace.logits[0], atol=1e-5)
    assert np.array_equal(alone.images, encoded.images)


def test_a_negative_prompt_guides_pictures_without_a_prompt(pipeline: Pipeline) -> None:
    plain = pipeline.generate(seed=1).images
    guided = pipeline.generate(seed=1, negative_prompt="red apple", guidance_scale=4.0).images
    assert not np.array_equal(plain, guided)


def test_a_model_without_text_draws(tmp_path: Path) -> None:
    pipeline = load_pipeline(new_checkpoint(tmp_path / "model", UNCONDITIONAL), device="cpu")
    assert len(pipeline.generate(seed=[1, 2]).images) == 2
    with pytest.raises(ConfigError, match="unconditional"):
        pipeline.generate(prompts=["red apple"])


def test_the_command_line_asks_which_is_meant(checkpoint: Path, tmp_path: Path) -> None:
    def generate(*options: str) -> str:
        words = ("generate", "--checkpoint", str(checkpoint), "--output-dir", str(tmp_path / "out"))
        return CliRunner().invoke(main, [*words, *options]).output

    assert "give --prompt, or --unconditional" in generate()
    assert "omit either" in generate("--unconditional", "--prompt", "red apple")
    assert "000" in generate("--unconditional", "--num-images", "2", "--seed", "7")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3  # with the sheet


def test_an_interval_outside_the_sequence_is_refused_without_a_prompt_too(
    pipeline: Pipeline,
) -> None:
    for prompts in (["red apple"], None):
        with pytest.raises(ConfigError, match="cfg_interval=99 is outside the sequence"):
            pipeline.generate(prompts=prompts, seed=1, cfg_interval=99)
