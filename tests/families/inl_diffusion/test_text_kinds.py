"""Prompts are read by CLIP, T5 or a plain encoder of the model's own, kept in its checkpoint."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.systems import save_checkpoint
from nsp.console.train_config import configure
from nsp.data.sources import ImageSource, Sample
from nsp.errors import ConfigError
from nsp.export.options import ExportOptions
from nsp.export.run import export
from nsp.families.inl_diffusion.config import TextKind
from nsp.families.inl_diffusion.learn import InlLearner
from nsp.families.inl_diffusion.model import open_gates
from nsp.families.inl_diffusion.system import InlSystem
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from nsp.text.parts import TextEncoderSettings
from nsp.text.plain import PlainTextModel
from nsp.training.whole_run import train
from tests.families.inl_diffusion.models import TINY
from tests.training.pictures import write_pictures

SOURCE = ImageSource((Sample(name="apple", captions=("red apple",), class_id=None),), (), ())
PROMPTS = ["red apple", "green apple"]


def _reading(kind: TextKind) -> InlSystem:
    """Return a small system whose prompts are read by an encoder of this kind."""
    torch.manual_seed(0)
    encoder = TextEncoderSettings(vocab_size=560, depth=1, num_heads=2)
    system = InlLearner().new_system(dataclasses.replace(TINY, text=kind), encoder, SOURCE)
    open_gates(system.dit)
    return system.eval()


def _image(pipeline: Pipeline) -> np.ndarray:
    return pipeline.generate(prompts=PROMPTS, num_inference_steps=3, guidance_scale=2.0).images


@pytest.mark.parametrize("kind", ["clip", "t5", "plain", "clip_pair"])
def test_a_checkpoint_keeps_its_text_encoder(kind: TextKind, tmp_path: Path) -> None:
    system = _reading(kind)
    save_checkpoint(tmp_path / "model", system, notes={})
    loaded = read_checkpoint(tmp_path / "model").load()
    for name, tensor in system.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    image = _image(load_pipeline(tmp_path / "model", device="cpu"))
    assert (image[0] != image[1]).any()  # prompts matter


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "clip_pair"])
def test_engines_read_prompts_as_the_checkpoint_does(kind: TextKind, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", _reading(kind), notes={})
    export(
        ExportOptions(
            checkpoint=str(tmp_path / "model"),
            engine_dir=str(tmp_path / "engines"),
            targets=("onnxruntime",),
        )
    )
    expected = _image(load_pipeline(tmp_path / "model", device="cpu")).astype(int)
    assert np.abs(_image(load_pipeline(tmp_path / "engines")) - expected).max() <= 1


def test_a_new_plain_encoder_learns_with_its_transformer(tmp_path: Path) -> None:
    run = configure("inl_diffusion_smoke", None, data=str(write_pictures(tmp_path / "pictures")))
    run = run.from_dict({**run.to_dict(), "model": {**run.model, "text": "plain"}})
    train(run, tmp_path / "run")
    trained = read_checkpoint(tmp_path / "run" / "checkpoint").load()
    assert isinstance(trained, InlSystem)
    assert isinstance(trained.text_encoder, PlainTextModel)
    assert (trained.text_encoder.ln_final.weight != 1).any()  # as it begins


@torch.no_grad()
def test_a_summary_has_no_effect_until_it_is_learned() -> None:
    system, ids = _reading("clip_pair"), torch.zeros(2, 8, dtype=torch.int64)
    dit = system.dit
    nn.init.zeros_(dit.pooled_embed.weight)
    nn.init.zeros_(dit.pooled_embed.bias)
    states = system.context(ids, torch.tensor([False, True]))
    assert torch.equal(states[1], dit.null_embedding[0])  # its summary is learned, too
    other = states.clone()
    other[:, -1] += 1
    latent, times = torch.randn(2, 4, 4, 4), torch.tensor([10, 700])
    assert torch.equal(dit(latent, times, states), dit(latent, times, other))
    nn.init.normal_(dit.pooled_embed.weight)
    assert not torch.equal(dit(latent, times, states), dit(latent, times, other))


def test_a_new_pair_learns_with_its_transformer(tmp_path: Path) -> None:
    run = configure("inl_diffusion_smoke", None, data=str(write_pictures(tmp_path / "pictures")))
    run = run.from_dict({**run.to_dict(), "model": {**run.model, "text": "clip_pair"}})
    train(run, tmp_path / "run")
    trained = read_checkpoint(tmp_path / "run" / "checkpoint").load()
    assert isinstance(trained, InlSystem)
    assert trained.dit.pooled_embed.weight.any()  # zero at first


def test_an_encoder_of_another_width_is_refused() -> None:
    one, other = (
        _reading("plain"),
        _reading("clip"),
    )
    narrow = one.config.from_dict(
        {**one.config.to_dict(), "dit": {**one.config.dit.to_dict(), "context_width": 12}}
    )
    assert one.prompt_tokenizer is not None
    with pytest.raises(ConfigError, match="width 16 with 8 tokens does not fit"):
        InlSystem(narrow, text_encoder=one.text_encoder, prompt_tokenizer=one.prompt_tokenizer)
    assert other.prompt_tokenizer is not None
    with pytest.raises(ConfigError, match="of type 'plain_text_encoder'; CLIP's is needed"):
        InlSystem(
            other.config, text_encoder=one.text_encoder, prompt_tokenizer=other.prompt_tokenizer
        )
    t5 = _reading("t5")
    with pytest.raises(ConfigError, match="with an encoder of kind t5"):
        InlSystem(t5.config, text_encoder=one.text_encoder, prompt_tokenizer=one.prompt_tokenizer)
