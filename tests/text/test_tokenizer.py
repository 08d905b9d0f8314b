"""What the tokenizer promises: CLIP's ids, any text, nothing lost in silence."""

import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nsp.errors import CheckpointError, ConfigError, DataError
from nsp.text.parts import without_tokens
from nsp.text.tokenizer import PromptTokenizer, train_tokenizer
from tests.weights.weight_states import POINTER

CAPTIONS = [
    "red apple",
    "green apple",
    "woman firefighter: medium-dark skin tone",
    "man firefighter: medium-light skin tone",
    "flag: Åland Islands",
    "flag: Côte d’Ivoire",
    "it's twelve o’clock!",
    "猫の顔 cat face",
    "猫の目 cat eyes",
] * 2
PROMPTS = [
    "",
    "red apple",
    "  A RED\tApple \n",
    "woman's hat, we'll see: 1234",
    "Åland Ålesund cafe\u0301",  # combining ring and acute: NFC joins them
    "猫 🐈‍⬛ नमस्ते \x00",
    "an <|endoftext|> inside",
    "! why? really!",
    "red apple " * 20,
]
MAX_TOKENS = 16
ANY_TEXT = train_tokenizer(CAPTIONS, vocab_size=600, max_tokens=256)  # room for any example


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return train_tokenizer(CAPTIONS, vocab_size=600, max_tokens=MAX_TOKENS)


@pytest.fixture
def folder(tokenizer: PromptTokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def as_old_folder(folder: Path) -> dict[str, int]:
    """Turn a saved folder into one from before `tokenizer.json`; return its vocabulary."""
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = saved["model"]["vocab"]
    merges = "\n".join(" ".join(pair) for pair in saved["model"]["merges"])
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer.json").unlink()
    return vocabulary


def transformers_ids(folder: Path, prompts: list[str]) -> list[list[int]]:
    from transformers import CLIPTokenizerFast

    reference = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    ids: list[list[int]] = reference(prompts, padding="max_length", truncation=True)["input_ids"]
    return ids


def test_prompts_are_framed_padded_and_keep_their_end_when_cut(tokenizer: PromptTokenizer) -> None:
    ids = tokenizer.encode(["", "red apple", "red apple " * 20])
    assert ids.shape == (3, MAX_TOKENS)
    assert ids.dtype == np.int64
    assert (ids[:, 0] == tokenizer.bos_id).all()
    assert (ids[0, 1:] == tokenizer.eos_id).all()
    assert (ids[1, 3:] == tokenizer.pad_id).all()
    assert tokenizer.eos_id not in ids[2, :-1]
    assert ids[2, -1] == tokenizer.eos_id
    assert tokenizer.encode([]).shape == (0, MAX_TOKENS)


def test_a_cut_prompt_is_reported_with_what_was_lost(
    tokenizer: PromptTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "red apple " * 7 + "cat face"
    with caplog.at_level(logging.WARNING):
        tokenizer.encode(["red apple", prompt])
    assert tokenizer.truncated(prompt) == "cat face"
    assert tokenizer.truncated("red apple") is None
    [record] = caplog.records
    assert "red apple red" in record.getMessage()
    assert "dropped 'cat face'" in record.getMessage()


def test_one_string_is_not_taken_for_a_list_of_prompts(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(TypeError, match="list of prompts"):
        tokenizer.encode("red apple")


@given(text=st.text(st.characters(), max_size=40))
@example(text="\ud83c")  # half a surrogate pair, as bad bytes on a command line become
@example(text="\x00\u200d\u0600")
def test_any_text_is_encoded_without_unknown_or_stray_end_tokens(text: str) -> None:
    ids = ANY_TEXT.encode([text])[0]
    end = int(np.argmax(ids == ANY_TEXT.eos_id))
    assert (ids[end:] == ANY_TEXT.eos_id).all()
    assert ids.max() < ANY_TEXT.vocab_size


def test_saved_folders_give_transformers_the_same_ids(
    tokenizer: PromptTokenizer, folder: Path
) -> None:
    ids = tokenizer.encode(PROMPTS).tolist()
    assert transformers_ids(folder, PROMPTS) == ids
    assert PromptTokenizer.load(folder).encode(PROMPTS).tolist() == ids


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_old_folders_give_the_ids_transformers_gives(folder: Path, pad_token: str) -> None:
    vocabulary = as_old_folder(folder)
    bos = {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": False}
    special = {"bos_token": bos, "eos_token": "<|endoftext|>", "pad_token": pad_token}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    loaded = PromptTokenizer.load(folder)
    assert loaded.pad_id == vocabulary[pad_token]
    assert loaded.encode(PROMPTS).tolist() == transformers_ids(folder, PROMPTS)
    loaded.save(folder / "again")
    assert loaded.encode(PROMPTS).tolist() == transformers_ids(folder / "again", PROMPTS)


def test_tokens_added_after_training_keep_their_ids(folder: Path) -> None:
    size = len(as_old_folder(folder))
    (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": size}))
    prompts = ["a <cat-toy> apple"]
    loaded = PromptTokenizer.load(folder)
    assert size in loaded.encode(prompts)
    assert loaded.vocab_size == size + 1
    assert loaded.encode(prompts).tolist() == transformers_ids(folder, prompts)
    (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": size + 7}))
    with pytest.raises(CheckpointError, match="should have id"):
        PromptTokenizer.load(folder)


def test_an_unstated_length_is_clips(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["model_max_length"] = 10**30
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert PromptTokenizer.load(folder).max_tokens == 77


def test_a_pipelines_tokenizer_is_found_by_subfolder(
    tokenizer: PromptTokenizer, folder: Path
) -> None:
    loaded = PromptTokenizer.load(folder.parent, subfolder="tokenizer")
    assert loaded.vocab_size == tokenizer.vocab_size
    with pytest.raises(CheckpointError, match="pass subfolder='tokenizer'"):
        PromptTokenizer.load(folder.parent)


@pytest.mark.parametrize(
    ("length", "stated"),
    [("1e30", 77), ("1000000000000000019884624838656", 77), ("null", 77), ("12.0", 12)],
)
def test_what_is_written_for_an_unstated_length_is_known(
    folder: Path, length: str, stated: int
) -> None:
    (folder / "tokenizer_config.json").write_text(f'{{"model_max_length": {length}}}')
    assert PromptTokenizer.load(folder).max_tokens == stated


@pytest.mark.parametrize(
    "length",
    ["-Infinity", "Infinity", "NaN", '"77"', "true", "7.5", "[]", "-1" + "0" * 400, "-1e30", "0"],
)
def test_a_length_that_is_no_number_of_tokens_is_one_line(folder: Path, length: str) -> None:
    (folder / "tokenizer_config.json").write_text(f'{{"model_max_length": {length}}}')
    with pytest.raises(CheckpointError, match="model_max_length is"):
        PromptTokenizer.load(folder)


def test_with_a_list_of_names_other_files_change_nothing(folder: Path) -> None:
    ids = PromptTokenizer.load(folder).encode(["a"]).tolist()
    (folder / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    listed = {"tokenizer.json", "tokenizer_config.json"}
    assert PromptTokenizer.load(folder).encode(["a"]).tolist() != ids
    assert PromptTokenizer.load(folder, listed=listed).encode(["a"]).tolist() == ids
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor"):
        PromptTokenizer.load(folder, listed={"tokenizer_config.json"})


@pytest.mark.parametrize(("name", "old"), [("tokenizer.json", False), ("merges.txt", True)])
def test_a_pointer_in_place_of_a_file_is_told(folder: Path, name: str, old: bool) -> None:
    if old:
        as_old_folder(folder)
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer"):
        PromptTokenizer.load(folder)


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "old", "message"),
    [
        (drop("tokenizer.json"), False, "neither tokenizer.json nor"),
        (write("tokenizer.json", '{"version": "1.0", "mod'), False, "cannot be read"),
        (write("tokenizer.json", '{"model": {"type": "WordLevel", "vocab": {"a": 0},'
               ' "unk_token": "a"}}'), False, "bos token .* is not among the 1 tokens"),
        (write("tokenizer_config.json", "[]"), False, "instead of an object"),
        (write("tokenizer_config.json", "[" * 100_000), False, "nested too deeply"),
        (write("tokenizer_config.json", '{"pad_token": "[PAD]"}'), False, "pad token '\\[PAD\\]'"),
        (write("tokenizer_config.json", '{"model_max_length": 2}'), False, "model_max_length is 2"),
        (write("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'), True, "added tok"),
        (drop("merges.txt"), True, "neither tokenizer.json nor"),
        (write("merges.txt", "a b c d\n"), True, "cannot be read"),
        (write("vocab.json", "{}"), True, "cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], None], old: bool, message: str
) -> None:
    if old:
        as_old_folder(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as refusal:
        PromptTokenizer.load(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize("kind", ["empty", "pipe", "link"])
def test_a_file_that_is_there_and_is_none_is_named(folder: Path, name: str, kind: str) -> None:
    (folder / "9077aa").mkdir()
    (folder / "9077aa/tokenizer.json").write_text("{}")  # another folder's, not to be advised
    (folder / name).unlink(missing_ok=True)
    if kind == "link":
        (folder / name).symlink_to("/nowhere")
    else:
        os.mkfifo(folder / name) if kind == "pipe" else (folder / name).touch()
    (folder / "merges.txt").touch()  # not read beside tokenizer.json
    with pytest.raises(CheckpointError, match=f"{name} (is|does)") as caught:
        PromptTokenizer.load(folder)
    assert "9077" not in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        PromptTokenizer.load(tmp_path / "nowhere")


def test_training_fills_the_vocabulary_in_clips_order(tokenizer: PromptTokenizer) -> None:
    assert tokenizer.vocab_size == 600
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (598, 599, 599)
    byte_only = train_tokenizer(["a", "b"], vocab_size=5000, max_tokens=8)
    assert byte_only.vocab_size == 514
    # CLIP's published ids of single characters: "!" 0, "a" 64; at a word's end 256 more.
    assert byte_only.encode(["aa!"])[0, 1:4].tolist() == [64, 320, 256]


def test_training_is_the_same_in_every_process(tokenizer: PromptTokenizer, tmp_path: Path) -> None:
    code = (
        "import sys; from nsp.text.tokenizer import train_tokenizer as train;"
        f"train({CAPTIONS!r}, vocab_size=600, max_tokens={MAX_TOKENS}).save(sys.argv[1]);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    tokenizer.save(tmp_path / "here")
    expected = (tmp_path / "here" / "tokenizer.json").read_bytes()
    for run in ("first", "second"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / run)], check=True)
        assert (tmp_path / run / "tokenizer.json").read_bytes() == expected


@pytest.mark.parametrize(
    ("captions", "vocab_size", "max_tokens", "error"),
    [
        (["a"], 513, 8, ConfigError),
        (["a"], 600, 2, ConfigError),
        ([], 600, 8, DataError),
        (["", " "], 600, 8, DataError),
    ],
)
def test_training_refuses_what_makes_no_tokenizer(
    captions: list[str], vocab_size: int, max_tokens: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        train_tokenizer(captions, vocab_size=vocab_size, max_tokens=max_tokens)


def test_it_travels_to_worker_processes(tokenizer: PromptTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.encode(PROMPTS) == tokenizer.encode(PROMPTS)).all()


def test_prompts_without_some_of_their_tokens_close_up() -> None:
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=600, max_tokens=16)
    ids = tokenizer.encode(CAPTIONS)
    dropped = np.random.default_rng(0).random(ids.shape) < 0.5
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    kept = [
        [token for token, gone in zip(row, flags, strict=True) if token in special or not gone]
        for row, flags in zip(ids.tolist(), dropped.tolist(), strict=True)
    ]
    expected = [[*row, *[tokenizer.pad_id] * (16 - len(row))] for row in kept]
    found = without_tokens(torch.from_numpy(ids), torch.from_numpy(dropped), tokenizer)
    assert found.tolist() == expected
    assert min(map(len, kept)) < 16
