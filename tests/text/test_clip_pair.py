"""Two CLIP text encoders read one prompt as transformers does, joined by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsp.artifacts.model_parts import load_text_model
from nsp.errors import CheckpointError
from nsp.text.clip_pair import ClipPair
from nsp.text.clip_pair_folder import ClipPairStage, clip_pair_parts, joined, load_clip_pair
from nsp.text.encoder import build_text_encoder, save_text_encoder
from nsp.text.parts import TextEncoderSettings
from nsp.text.tokenizer import PromptTokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel

TOKENS, FIRST, SECOND = 9, 16, 24
PROMPTS = ["a cat", "red apple on a table", ""]
_FILLING = 7  # pads prompts of the second encoder, as SDXL's "!" does


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return train_tokenizer(PROMPTS, vocab_size=520, max_tokens=TOKENS)


@pytest.fixture(scope="module")
def encoders(tokenizer: PromptTokenizer) -> "list[CLIPTextModel]":
    torch.manual_seed(0)
    made = [build_text_encoder(tokenizer, width=w, depth=2, num_heads=2) for w in (FIRST, SECOND)]
    with torch.no_grad():  # CLIP's own start hardly uses the tokens
        for parameter in (each for encoder in made for each in encoder.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return [encoder.eval() for encoder in made]


@pytest.fixture
def pipeline(encoders: "list[CLIPTextModel]", tokenizer: PromptTokenizer, tmp_path: Path) -> Path:
    """A folder like SDXL's, whose second tokenizer fills up prompts with another token."""
    for number, encoder in zip(("", "_2"), encoders, strict=True):
        save_text_encoder(encoder, tmp_path / f"text_encoder{number}")
        tokenizer.save(tmp_path / f"tokenizer{number}")
    settings = tmp_path / "tokenizer_2" / "tokenizer_config.json"
    filling = token(tokenizer, _FILLING)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "pad_token": filling}))
    return tmp_path


def token(tokenizer: PromptTokenizer, number: int) -> str:
    found: str = tokenizer._tokenizer.id_to_token(number)
    return found


@torch.no_grad()
def test_states_and_summary_are_those_of_transformers_joined_by_hand(
    pipeline: Path, encoders: "list[CLIPTextModel]"
) -> None:
    tokenizer, pair = clip_pair_parts(TextEncoderSettings(folder=str(pipeline)), 0, 0, None)
    other = PromptTokenizer.load(pipeline, subfolder="tokenizer_2")
    ids = [torch.from_numpy(each.encode(PROMPTS)) for each in (tokenizer, other)]
    assert not torch.equal(*ids)
    first, second = (encoder(input_ids=own) for encoder, own in zip(encoders, ids, strict=True))
    states = torch.cat([first.last_hidden_state, second.last_hidden_state], -1)
    (found,) = ClipPairStage(pair.eval())(ids[0])
    assert found.shape == (len(PROMPTS), TOKENS + 1, FIRST + SECOND)
    torch.testing.assert_close(found[:, :-1], states, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, -1, :SECOND], second.pooler_output, atol=1e-5, rtol=0)
    assert not found[:, -1, SECOND:].any()


def test_a_folder_loads_exactly(
    encoders: "list[CLIPTextModel]", tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    pair = joined(*encoders, second_pad_id=_FILLING)
    save_text_encoder(pair, tmp_path / "text_encoder")
    loaded = load_text_model(tmp_path / "text_encoder")
    assert isinstance(loaded, ClipPair)
    assert loaded.config == pair.config
    assert (loaded.config.width, loaded.config.pooled_width) == (FIRST + SECOND, SECOND)
    for name, tensor in pair.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edited(f, second=None), "second cannot be loaded: text_config is None"),
        (lambda f: edited(f, second_pad_id=-1), "second_pad_id must be"),
        (
            lambda f: changed(f, lambda s: s.pop("second.final_layer_norm.bias")),
            "second lacks 1 weights, first final_layer_norm.bias",
        ),
        (lambda f: changed(f, lambda s: s.update(x=torch.ones(1))), "x belongs to neither"),
    ],
)
def test_a_bad_folder_is_one_line(
    damage: Callable[[Path], Any],
    message: str,
    encoders: "list[CLIPTextModel]",
    tmp_path: Path,
) -> None:
    save_text_encoder(joined(*encoders, second_pad_id=0), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_clip_pair(tmp_path)
    assert "\n" not in str(caught.value)


def test_one_of_two_encoders_is_refused(pipeline: Path) -> None:
    (pipeline / "text_encoder_2").rename(pipeline / "away")
    with pytest.raises(CheckpointError, match="has no text_encoder_2; a model with two"):
        clip_pair_parts(TextEncoderSettings(folder=str(pipeline)), 0, 0, None)


def test_two_vocabularies_are_refused(pipeline: Path) -> None:
    train_tokenizer(["a dog, a dog"], vocab_size=518, max_tokens=TOKENS).save(
        pipeline / "tokenizer_2"
    )
    with pytest.raises(CheckpointError, match="must read the same tokens"):
        clip_pair_parts(TextEncoderSettings(folder=str(pipeline)), 0, 0, None)
