"""Engines without their text encoder draw pictures without a prompt, in each family that can."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from nsp.artifacts.systems import save_checkpoint
from nsp.cli import main
from nsp.data.sources import ImageSource, Sample
from nsp.errors import ConfigError, EngineError
from nsp.export.options import ExportOptions
from nsp.export.run import export as run_export
from nsp.family.order import Order
from nsp.family.registry import BUILT_IN, family
from nsp.pipeline.pipeline import load_pipeline
from nsp.text.parts import TextEncoderSettings
from tests.models import CAPTIONS

FAMILIES = [name for name in BUILT_IN if family(name).draws_without_prompt]


@pytest.fixture(scope="module", params=FAMILIES)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engines of a small model of captions with random weights of which each matters."""
    owner, place = family(request.param), tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    source = ImageSource(tuple(Sample(c, (c,), None) for c in CAPTIONS), (), ())
    text_encoder = TextEncoderSettings(vocab_size=560, depth=1, num_heads=2)
    system = owner.learner.new_system(owner.sizes["tiny"], text_encoder, source).eval()
    for parameter in system.get_submodule(owner.learner.parts[0]).parameters():
        nn.init.normal_(parameter, std=0.2)
    save_checkpoint(place / "model", system, notes={"made_by": "tests"})
    run_export(
        ExportOptions(
            checkpoint=str(place / "model"),
            engine_dir=str(place / "engines"),
            targets=("onnxruntime",),
        )
    )
    return place / "engines"


def test_engines_without_a_text_encoder_draw_what_the_whole_ones_draw(
    engines: Path, tmp_path: Path
) -> None:
    whole = load_pipeline(engines)
    expected = whole.generate(seed=[1, 2]).images
    prompted = whole.generate(prompts=["red apple"], seed=1).images
    assert not np.array_equal(prompted[0], expected[0])
    alone = tmp_path / "engines"
    shutil.copytree(engines, alone)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(alone / part)
    pipeline = load_pipeline(alone)
    assert np.array_equal(pipeline.generate(seed=[1, 2]).images, expected)
    with pytest.raises(ConfigError, match="without its text encoder"):
        pipeline.generate(prompts=["red apple"])
    with pytest.raises(ConfigError, match="without its text encoder"):
        pipeline.generate(negative_prompt="red apple")
    words = ("generate", "--engine-dir", str(alone), "--output-dir", str(tmp_path / "out"))
    result = CliRunner().invoke(main, [*words, "--unconditional", "--seed", "1"])
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "out").glob("*.png"))


def test_a_text_encoder_that_is_only_damaged_is_an_error(engines: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "engines"
    shutil.copytree(engines, damaged)
    next((damaged / "text_encoder").glob("*/model.onnx")).unlink()
    with pytest.raises(EngineError, match="missing though the manifest lists it"):
        load_pipeline(damaged)


def test_a_guided_batch_mixes_pictures_with_and_without_a_prompt(engines: Path) -> None:
    pipeline = load_pipeline(engines)
    sampling = pipeline.sampling.changed({"guidance_scale": 3.0})
    plain = Order(None, 1, sampling, negative="smiling cat")
    prompted = Order("red apple", 2, sampling)
    together = pipeline.images([plain, prompted])
    for row, order in enumerate((plain, prompted)):
        np.testing.assert_allclose(pipeline.images([order])[0], together[row], atol=1e-4)
