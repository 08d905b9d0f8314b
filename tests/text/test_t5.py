"""T5 folders load exactly, and left padding is the public code's right padding, moved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from nsp.errors import CheckpointError, ConfigError
from nsp.text.encoder import save_text_encoder
from nsp.text.t5 import (
    T5Stage,
    build_t5,
    check_t5_parts,
    first_tokens,
    load_t5,
    pretrained_t5,
)
from nsp.text.tokenizer import PromptTokenizer
from tests.text.prompt_tokenizers import T5_TOKENS, t5_like

if TYPE_CHECKING:
    from transformers import T5EncoderModel

WIDTH, TOKENS = 16, 9
PROMPTS = ["a cat", "a red apple on a table, a cat", ""]


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    made: Tokenizer = t5_like()
    return PromptTokenizer(made, max_tokens=TOKENS, special_tokens=T5_TOKENS)


@pytest.fixture(scope="module")
def model(tokenizer: PromptTokenizer) -> "T5EncoderModel":
    torch.manual_seed(0)
    made = build_t5(tokenizer, width=WIDTH, depth=2, num_heads=2)
    with torch.no_grad():  # T5's own start hardly uses positions
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made.eval()


@pytest.fixture
def folder(model: "T5EncoderModel", tokenizer: PromptTokenizer, tmp_path: Path) -> Path:
    save_text_encoder(model, tmp_path / "t5")
    tokenizer.save(tmp_path / "t5")
    return tmp_path / "t5"


@torch.no_grad()
def test_left_padding_gives_the_states_of_right_padding_at_the_end(
    model: "T5EncoderModel", tokenizer: PromptTokenizer
) -> None:
    stage, left = T5Stage(model), tokenizer.padded_left().tokenize(PROMPTS)
    ids, mask = torch.from_numpy(left.token_ids), torch.from_numpy(left.mask)
    (states,) = stage(ids, mask)
    right = tokenizer.tokenize(PROMPTS)
    lengths = torch.from_numpy(right.mask).sum(1).tolist()
    public = model(  # as the public code calls it
        input_ids=torch.from_numpy(right.token_ids), attention_mask=torch.from_numpy(right.mask)
    ).last_hidden_state
    for row, length in enumerate(lengths):
        rolled = public[row].roll(TOKENS - length, 0)
        rolled[: TOKENS - length] = 0
        torch.testing.assert_close(states[row], rolled, atol=1e-5, rtol=0)
    assert torch.equal(first_tokens(ids, tokenizer.pad_id), TOKENS - torch.tensor(lengths))


def test_a_folder_loads_exactly(model: "T5EncoderModel", folder: Path) -> None:
    prompts, encoder = pretrained_t5(folder, TOKENS + 2)
    assert (prompts.max_tokens, prompts.padding_side) == (TOKENS + 2, "left")
    for name, tensor in model.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    state = load_file(folder / "model.safetensors")  # as a whole T5 is stored
    shared = state.pop("shared.weight")
    whole = {**state, "encoder.embed_tokens.weight": shared, "decoder.block.0.w": torch.ones(2)}
    save_file(whole, folder / "model.safetensors")
    assert torch.equal(load_t5(folder).shared.weight, shared)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n != name}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edited(f, num_layers=3), "lacks 9 weights, first encoder.block.2"),
        (lambda f: edited(f, num_layers=1), "does not use 9 weights, first encoder.block.1"),
        (lambda f: edited(f, d_ff=7), "wrong shape"),
        (lambda f: edited(f, d_model=-1), "d_model must be"),
        (lambda f: edited(f, feed_forward_proj="x"), "feed_forward_proj"),
        (lambda f: edited(f, model_type="clip"), "'clip'; one of t5 is needed"),
        (lambda f: without(f, "shared.weight"), "shared.weight"),
        (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json; give a T5"),
    ],
)
def test_a_bad_folder_is_one_line(
    damage: Callable[[Path], Any], message: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_t5(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist; give a T5 folder"):
        load_t5(tmp_path / "nowhere")


def test_parts_of_two_models_are_refused(
    model: "T5EncoderModel", tokenizer: PromptTokenizer
) -> None:
    left = tokenizer.padded_left()
    check_t5_parts(model, left, text_width=WIDTH, max_tokens=TOKENS)
    with pytest.raises(ConfigError, match="does not fit text_width=8"):
        check_t5_parts(model, left, text_width=8, max_tokens=TOKENS)
    with pytest.raises(ConfigError, match="pads on the right"):
        check_t5_parts(model, tokenizer, text_width=WIDTH, max_tokens=TOKENS)
    with pytest.raises(ConfigError, match="width=7"):
        build_t5(tokenizer, width=7, depth=1, num_heads=2)
