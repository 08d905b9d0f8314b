"""The transformer is transformers' GPT-2 with cross-attention, under a map of names."""

import dataclasses
import inspect
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.systems import save_checkpoint
from nsp.families.latent_gpt.config import SIZES, TextCondition
from nsp.families.latent_gpt.learn import LatentGptLearner
from nsp.families.latent_gpt.model import Gpt
from nsp.families.latent_gpt.system import LatentGptSystem
from nsp.family.order import Order
from nsp.family.registry import family
from nsp.pipeline.pipeline import torch_pipeline
from nsp.raster.sampling import RasterSampling
from tests.families.latent_gpt.models import TINY, UNCONDITIONAL, new_system

# Ours -> theirs, in a block and outside. Their Conv1D has its matrix transposed.
IN_BLOCK = {
    "norm1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "cross_norm": "ln_cross_attn",
    "cross.q": "crossattention.q_attn",
    "cross.kv": "crossattention.c_attn",
    "cross.proj": "crossattention.c_proj",
    "norm2": "ln_2",
    "ffn.fc1": "mlp.c_fc",
    "ffn.fc2": "mlp.c_proj",
}
OUTSIDE = {"token_embedding": "wte", "position_embedding": "wpe", "norm": "ln_f"}


def new_gpt2(gelu: Literal["exact", "tanh"]) -> GPT2LMHeadModel:
    """Return a random one with the sizes of TINY whose text has the width of the model."""
    torch.manual_seed(1)
    grid = TINY.grid
    config = GPT2Config(
        vocab_size=grid.num_codes + 1,
        n_positions=grid.length,
        n_embd=TINY.gpt.width,
        n_layer=TINY.gpt.depth,
        n_head=TINY.gpt.num_heads,
        activation_function={"exact": "gelu", "tanh": "gelu_new"}[gelu],
        add_cross_attention=True,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "ln_" in name:
            torch.nn.init.normal_(parameter, mean="ln" in name, std=0.1)
    return model


def load_gpt2(gpt: Gpt, model: GPT2LMHeadModel) -> None:
    theirs = model.transformer.state_dict()
    state = {"null_context": gpt.null_context}
    state["head.weight"] = model.lm_head.weight[: gpt.head.out_features]
    for name in gpt.state_dict().keys() - state.keys():
        part, _, kind = name.rpartition(".")
        if part in OUTSIDE:
            state[name] = theirs[f"{OUTSIDE[part]}.{kind}"]
            continue
        _, index, inside = part.split(".", 2)
        found = theirs[f"h.{index}.{IN_BLOCK[inside]}.{kind}"]
        state[name] = found.T if found.ndim == 2 else found
    gpt.load_state_dict(state)


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
@torch.no_grad()
def test_logits_and_greedy_tokens_equal_gpt2(gelu: Literal["exact", "tanh"]) -> None:
    text = TextCondition(text_width=TINY.gpt.width, max_tokens=6)
    config = dataclasses.replace(TINY, text=text, gpt=dataclasses.replace(TINY.gpt, gelu=gelu))
    system, gpt2 = new_system(config), new_gpt2(gelu)
    load_gpt2(system.gpt, gpt2)
    codes, bos = torch.randint(config.bos, (2, 16)), torch.full((2, 1), config.bos)
    states = torch.randn(2, 6, config.gpt.width)
    seen = {"encoder_hidden_states": states}
    expected = gpt2(torch.cat([bos, codes[:, :-1]], 1), **seen).logits[..., : config.bos]
    found = system.gpt(system.gpt.read(states), codes)
    assert expected.std() > 1  # the comparison means something
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    # Their cache, whose name depends on the version of transformers.
    name = "cache" if "cache" in inspect.signature(gpt2.forward).parameters else "past_key_values"
    tokens, past = bos, None
    for _ in range(16):
        made = gpt2(tokens[:, -1:], **{name: past}, use_cache=True, **seen)
        past = made[name]
        drawn = made.logits[:, -1:, : config.bos].argmax(-1)
        tokens = torch.cat([tokens, drawn], 1)
    # Our loop with its cache, and what a pass without one chooses for the same codes.
    assert torch.equal(cached(system, states), tokens[:, 1:])
    whole = system.gpt(system.gpt.read(states), tokens[:, 1:])
    assert torch.equal(whole.argmax(-1), tokens[:, 1:])


def cached(system: LatentGptSystem, states: Tensor) -> Tensor:
    """Return the codes (B, N) that the stages draw greedily for encoded prompts."""
    greedy = RasterSampling(top_k=1, guidance_scale=1.0)
    pipeline = torch_pipeline(family("latent_gpt"), system, device="cpu")
    orders = [Order("red apple", seed, greedy) for seed in range(len(states))]
    inputs = pipeline._inputs(orders)
    inputs["text_states"] = states.numpy()
    steps = pipeline._play(inputs, len(orders), trace=True)
    return torch.tensor(np.concatenate([np.hstack(step.drawn["tokens"]) for step in steps], 1))


@torch.no_grad()
def test_a_position_does_not_see_later_codes() -> None:
    gpt = new_system(UNCONDITIONAL).gpt
    codes = torch.randint(64, (1, 16))
    changed = codes.clone()
    changed[:, 9] = (codes[:, 9] + 1) % 64
    nothing = [None] * len(gpt.blocks)
    before, after = gpt(nothing, codes), gpt(nothing, changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10], after[:, 10])


def test_the_large_model_has_the_parameters_of_the_reference() -> None:
    config = SIZES["500m"]
    with torch.device("meta"):
        gpt = Gpt(config)
    positions = config.grid.length * config.gpt.width  # learned here, computed there
    assert round((sum(p.numel() for p in gpt.parameters()) - positions) / 1e5) == 4115


@torch.no_grad()
def test_patches_are_predicted_from_those_before() -> None:
    gpt = new_system(UNCONDITIONAL).gpt
    codes = torch.randint(64, (1, 16))
    nothing = [None] * len(gpt.blocks)
    logits = gpt(nothing, codes, patch_side=2)
    assert logits.shape == (1, 4, 64)
    codes[:, 10:12] += 1  # of the last patch, which is not fed
    assert torch.equal(gpt(nothing, codes % 64, patch_side=2), logits)


def test_the_stored_null_prompt_is_what_the_encoder_makes_of_none(tmp_path: Path) -> None:
    system = new_system()
    assert system.text_encoder is not None
    for parameter in system.text_encoder.parameters():  # it has learned
        parameter.data += 0.1
    save_checkpoint(tmp_path / "model", system, notes={})
    system = read_checkpoint(tmp_path / "model").load()
    modules = LatentGptLearner().modules(system, "delta")
    states = modules["text_encoder"](system.encode_prompts([""]))[0]
    assert torch.equal(system.gpt.null_context, states)
