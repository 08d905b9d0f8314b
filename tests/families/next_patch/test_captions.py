"""Models of captions compute what the public implementation computes from T5's states."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.systems import save_checkpoint
from nsp.cli import main
from nsp.errors import ConfigError
from nsp.families.next_patch.model import prefix_mask
from nsp.families.next_patch.published import convert
from nsp.families.next_patch.system import NextPatchSystem
from nsp.family.order import Encoded, Order
from nsp.family.registry import family
from nsp.pipeline.encoding import PromptEncoder
from nsp.pipeline.pipeline import load_pipeline, torch_pipeline
from nsp.raster.patches import patch_loss
from nsp.raster.sampling import RasterSampling
from nsp.testing import UnderTest
from nsp.text.encoder import save_text_encoder
from nsp.text.t5 import build_t5
from nsp.text.tokenizer import train_tokenizer
from tests.goldens.llamagen_tiny.fixtures import arguments, config, tensors, weights

IO, SIDE = tensors(), config()["grid"]
FIRST = (IO["t2i.emb_mask"] == 0).sum(1)
FREE = torch.zeros(3, dtype=torch.bool)


@cache
def golden() -> NextPatchSystem:
    """Return the golden model of captions with a small T5, converted."""
    condition = config()["gpt_t2i"]
    tokenizer = train_tokenizer(["a cat"], vocab_size=520, max_tokens=condition["cls_token_num"])
    with tempfile.TemporaryDirectory() as folder:
        t5, out = Path(folder) / "t5", Path(folder) / "checkpoint"
        encoder = build_t5(tokenizer, width=condition["caption_dim"], depth=1, num_heads=2)
        save_text_encoder(encoder, t5)
        tokenizer.save(t5)
        files = {"tokenizer": weights("vq"), "predictor": weights("gpt_t2i")}
        convert(**files, text_encoder=t5, config=arguments("gpt_t2i"), output_dir=out)
        loaded: NextPatchSystem = read_checkpoint(out).load()
        return loaded


@torch.no_grad()
def test_training_matches() -> None:
    system, caption = golden(), IO["t2i.caption"]
    mask = prefix_mask(FIRST, caption.shape[1], IO["t2i.attn_mask"].shape[-1])
    assert torch.equal(mask, IO["t2i.attn_mask"].bool())
    found = system.gpt.cls_embedding(caption)
    torch.testing.assert_close(found, IO["t2i.cond_embeddings"], atol=1e-4, rtol=0)
    logits = system.caption_logits(caption, FIRST, FREE, IO["t2i.codes"])
    torch.testing.assert_close(logits, IO["t2i.train.logits"], atol=1e-4, rtol=0)
    losses = patch_loss(logits, IO["t2i.codes"], SIDE, 1)
    valid = losses[IO["t2i.valid"].bool()].mean()
    torch.testing.assert_close(valid, IO["t2i.train.loss_valid"], atol=1e-5, rtol=0)
    torch.testing.assert_close(losses.mean(), IO["t2i.train.loss_all"], atol=1e-5, rtol=0)
    plain = system.gpt(found[:1], IO["t2i.codes"][:1])
    torch.testing.assert_close(plain, IO["t2i.train.logits_nomask"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_dropped_caption_keeps_the_mask_of_its_padding() -> None:
    dropped = torch.tensor([False, True, False])
    logits = golden().caption_logits(IO["t2i.caption"], FIRST, dropped, IO["t2i.codes"])
    expected = IO["t2i.train.logits_row1_dropped"]
    torch.testing.assert_close(logits[1:2], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["delta", "fixed"])
def test_the_greedy_trace_matches_code_for_code(layout: str) -> None:
    owner, system = family("next_patch"), golden()
    pipeline = torch_pipeline(owner, system, kv_layout=layout, device="cpu")
    scale = config()["sample"]["t2i_cfg_scale"]
    orders = [Order("", seed, RasterSampling(guidance_scale=scale, top_k=1)) for seed in range(2)]
    text = Encoded(
        {"text_states": IO["t2i.caption"][:2].numpy()},
        IO["t2i.emb_mask"][:2].long().numpy(),
        np.zeros(2, bool),
        np.zeros(2, bool),
    )
    backend, inputs = pipeline.backend, owner.inputs(system.config, orders, text)
    uploaded = {name: backend.upload(array) for name, array in inputs.items()}
    with torch.no_grad():
        *_, last = owner.loop(backend, system.config, uploaded)
    assert last.latent is not None
    codes = backend.download(last.latent).reshape(2, -1)
    assert np.array_equal(codes, IO["t2i.sample.cfg.tokens"].numpy())


@torch.no_grad()
def test_prompts_are_encoded_in_training_as_in_generation() -> None:
    system = golden()
    pipeline = torch_pipeline(family("next_patch"), system, kv_layout="delta", device="cpu")
    prompts = ["a cat", "a"]
    assert system.prompt_tokenizer is not None
    encoder = PromptEncoder(system.prompt_tokenizer, pipeline.backend, max_batch=None)
    text = encoder.encode(prompts, [None, None])
    ids = system.encode_prompts(prompts)
    first = torch.from_numpy((text.mask[:2] == 0).sum(1))
    free, codes = torch.zeros(2, dtype=torch.bool), IO["t2i.codes"][:2]
    states = torch.from_numpy(text.states["text_states"][:2])
    expected = system.caption_logits(states, first, free, codes)
    torch.testing.assert_close(system.logits(ids, free, codes), expected, atol=1e-5, rtol=0)


def test_a_model_of_captions_needs_its_t5_and_one_of_classes_none(tmp_path: Path) -> None:
    for name, t5, message in (
        ("gpt_t2i", None, "give its T5 folder with --text-encoder"),
        ("gpt", tmp_path, "omit --text-encoder"),
    ):
        files = {"tokenizer": weights("vq"), "predictor": weights(name)}
        given = arguments(name)
        with pytest.raises(ConfigError, match=message):
            convert(**files, text_encoder=t5, config=given, output_dir=tmp_path / "out")


def test_prompts_of_a_converted_model_are_cleaned_as_its_captions_were() -> None:
    prompts = golden().prompt_tokenizer  # as read from the checkpoint
    assert prompts is not None
    same = ["a cat", " A   Cat ", "A (cat)", "a *** #cat...", "a http://a.b/c?d=1 cat"]
    ids = prompts.encode(same)
    assert (ids == ids[0]).all()
    quoted = prompts.encode(["'a'", "\u2018a\u2019", "a-a", "a\u2014a"])
    assert (quoted[0] == quoted[1]).all()
    assert (quoted[2] == quoted[3]).all()


def test_engines_of_captions_draw_what_pytorch_draws(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", golden(), notes={})
    folders = (
        "--checkpoint",
        str(tmp_path / "checkpoint"),
        "--engine-dir",
        str(tmp_path / "engines"),
    )
    result = CliRunner().invoke(main, ["export", "--fp32", *folders])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "engines/manifest.json").read_text().count('"prefill"')
    found = []
    for name in ("checkpoint", "engines"):
        pipeline = load_pipeline(tmp_path / name, device="cpu")
        made = pipeline.generate(
            prompts=["a cat", "a"], negative_prompt="a cat", seed=3, guidance_scale=3.0, trace=True
        )
        assert made.trace is not None
        found.append(np.concatenate(made.trace.tokens, 1))
    assert np.array_equal(*found)


def test_the_conformance_suite_tries_the_prefix_and_the_t5_of_captions(tmp_path: Path) -> None:
    made = UnderTest(family("next_patch"), tmp_path)
    assert [*made.declared] == ["text_encoder", "prefill", "decode", "decoder"]
    assert made.system.text_encoder.config.model_type == "t5"
    assert all(isinstance(order.condition, str) for order in made.orders)
