"""What holds for every tokenizer: the ids and the mask of transformers, from the same files."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from nsp.errors import CheckpointError, ConfigError
from nsp.text.encoder import build_text_encoder, check_text_parts
from nsp.text.tokenizer import PromptTokenizer, train_tokenizer
from tests.text.prompt_tokenizers import (
    CAPTIONS,
    T5_TOKENS,
    WORD_TOKENS,
    save,
    t5_like,
    word_level,
)

PROMPTS = [
    "",
    "red apple",
    "  A RED\tapple \n",
    "Åland cafe\u0301 ﬁre",  # a ligature, which NFKC takes apart
    "猫 🐈‍⬛",
    "a </s> inside <pad> of [PAD] it",
    "red apple " * 20,
]
MAX_TOKENS = 12
KINDS: dict[str, tuple[Callable[[], Tokenizer], dict[str, str]]] = {
    "unigram": (t5_like, T5_TOKENS),
    "word": (word_level, WORD_TOKENS),
}


def saved(
    folder: Path, kind: str, side: Literal["left", "right"] = "right", max_tokens: int = MAX_TOKENS
) -> Path:
    make, special = KINDS[kind]
    save(make(), folder, special, max_tokens=max_tokens, padding_side=side)
    return folder


def edit(folder: Path, name: str = "tokenizer_config.json", **changes: object) -> None:
    values = json.loads((folder / name).read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / name).write_text(json.dumps(kept))


def assert_equal_transformers(folder: Path, tokenizer: PromptTokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    expected = reference(PROMPTS, padding="max_length", truncation=True)
    found = tokenizer.tokenize(PROMPTS)
    assert found.token_ids.tolist() == expected["input_ids"]
    assert found.mask.tolist() == expected["attention_mask"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_mask_are_those_of_transformers_before_and_after_saving(
    kind: str, side: Literal["left", "right"], tmp_path: Path
) -> None:
    loaded = PromptTokenizer.load(saved(tmp_path / "given", kind, side))
    assert_equal_transformers(tmp_path / "given", loaded)
    loaded.save(tmp_path / "again")
    again = PromptTokenizer.load(tmp_path / "again")
    assert_equal_transformers(tmp_path / "again", again)
    assert (again.encode(PROMPTS) == loaded.encode(PROMPTS)).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_t5_prompts_have_no_start_token_and_keep_their_end(
    side: Literal["left", "right"], tmp_path: Path
) -> None:
    tokenizer = PromptTokenizer.load(saved(tmp_path, "unigram", side))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 1, 0)
    found = tokenizer.tokenize(["", "red apple", "red apple " * 20])
    assert found.token_ids.dtype == found.mask.dtype == np.int64
    assert found.token_ids.shape == found.mask.shape == (3, MAX_TOKENS)
    for ids, mask in zip(found.token_ids, found.mask, strict=True):
        read = ids[mask == 1]
        assert read[-1] == 1
        assert 1 not in read[:-1]
        assert (ids[mask == 0] == 0).all()
    lengths = found.mask.sum(axis=1)
    assert lengths[0] == 1
    assert lengths[2] == MAX_TOKENS
    assert (found.mask[:, -1] == (1 if side == "left" else [0, 0, 1])).all()


def test_the_mask_tells_padding_from_the_same_token_in_a_prompt(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer.load(saved(tmp_path, "word"))
    found = tokenizer.tokenize(["apple", "apple [PAD]"])
    assert (found.token_ids[0] == found.token_ids[1]).all()
    assert found.mask.sum(axis=1).tolist() == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_prompt_is_reported_with_what_was_lost(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = PromptTokenizer.load(saved(tmp_path, kind, max_tokens=4))
    prompt = "apple " * 20 + "twelve"
    tail = tokenizer.truncated(prompt)
    assert tail is not None
    assert prompt.endswith(tail)
    assert tail.endswith("apple twelve")
    assert tokenizer.truncated("red") is None
    with caplog.at_level(logging.WARNING):
        tokenizer.encode([prompt, "red"])
    [record] = caplog.records
    frame = int(kind == "unigram")
    assert f"longer than 4 tokens, counting {frame} for its start and end" in record.getMessage()


def test_a_model_may_take_another_length_than_its_folder_states(tmp_path: Path) -> None:
    folder = saved(tmp_path / "given", "unigram", max_tokens=512)
    tokenizer = PromptTokenizer.load(folder, max_tokens=6)
    tokenizer.save(tmp_path / "cut")
    assert PromptTokenizer.load(tmp_path / "cut").max_tokens == 6
    edit(folder, model_max_length=10**30)
    assert PromptTokenizer.load(folder, max_tokens=6).max_tokens == 6
    with pytest.raises(CheckpointError, match="states no model_max_length"):
        PromptTokenizer.load(folder)


def test_padding_in_tokenizer_json_counts_where_the_settings_are_silent(tmp_path: Path) -> None:
    folder = saved(tmp_path, "unigram")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(direction="left", pad_id=0, pad_token="<pad>")
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder, pad_token=None, padding_side=None)
    loaded = PromptTokenizer.load(folder)
    assert loaded.pad_id == 0
    assert loaded.encode(["red"])[0, 0] == 0


def put_around(folder: Path, token_id: int) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", token_id)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit(folder, pad_token=None), "names no pad_token"),
        (lambda folder: edit(folder, pad_token=""), "pad token '' is not among"),
        (lambda folder: edit(folder, eos_token="<|end|>"), "eos token '<|end|>' is not among"),
        (lambda folder: edit(folder, padding_side="up"), "padding_side is 'up'"),
        (lambda folder: edit(folder, truncation_side="left"), "truncation_side is 'left'"),
        (lambda folder: edit(folder, model_max_length=1), "model_max_length is 1; at least 2"),
        (lambda folder: put_around(folder, 5000), "puts token 5000 around prompts"),
        (lambda folder: (folder / "tokenizer.json").rename(folder / "spiece.model"),
         "can make tokenizer.json from a SentencePiece model"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    damage(saved(tmp_path, "unigram"))
    with pytest.raises(CheckpointError) as refusal:
        PromptTokenizer.load(tmp_path)
    assert message in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_prompt_that_the_tokenizer_cannot_read_is_named() -> None:
    words = Tokenizer(WordLevel({"red": 0}, unk_token="[UNK]"))
    tokenizer = PromptTokenizer(words, max_tokens=4, special_tokens={"pad_token": "red"})
    with pytest.raises(ConfigError, match=r"cannot read the prompt 'blue': .*\[UNK\]"):
        tokenizer.encode(["red", "blue"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_text_encoder_takes_no_other_tokenizer(kind: str, tmp_path: Path) -> None:
    clip = train_tokenizer(CAPTIONS, vocab_size=530, max_tokens=MAX_TOKENS)
    encoder = build_text_encoder(clip, width=8, depth=1, num_heads=1)
    check_text_parts(encoder, clip, text_width=8, max_tokens=MAX_TOKENS)
    other = PromptTokenizer.load(saved(tmp_path, kind))
    with pytest.raises(ConfigError, match="does not do so, give CLIP's"):
        check_text_parts(encoder, other, text_width=8, max_tokens=MAX_TOKENS)
