"""Hugging Face tokenizer folders: any `tokenizer.json`, and CLIP's older files.

`tokenizer.json` has the tokenizer and its frame of a prompt. Other files have special tokens,
padding side and prompt length. Older folders of CLIP have `vocab.json` and `merges.txt` instead.

This file runs in the deployment image: tokenizers, no torch.
"""

import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.models import BPE

from nsp.errors import CheckpointError
from nsp.sniff import explain, sniff
from nsp.text.clip_bpe import (
    CLIP_MAX_TOKENS,
    CLIP_TOKENS,
    EOS_TOKEN,
    WORD_END,
    clip_tokenizer,
    frame_prompts,
    is_clip,
)
from nsp.weights.weight_files import read_settings

log = logging.getLogger(__name__)

_NOT_STATED = 1e9  # a length of this size or more
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True, kw_only=True)
class TokenizerFolder:
    """The content of a published tokenizer folder."""

    tokenizer: Tokenizer
    max_tokens: int
    special_tokens: Mapping[str, str]  # by name: "pad_token", and "bos_token", "eos_token" if any
    padding_side: Literal["left", "right"]


def read_tokenizer_folder(
    root: Path, listed: Collection[str] | None = None, max_tokens: int | None = None
) -> TokenizerFolder:
    """Return the tokenizer in `root` with its special tokens, padding side and prompt length.

    With `listed` only files of those names are read: other files, which nobody verified, have no
    effect. `max_tokens` replaces the length in the folder. Raises CheckpointError when a file is
    missing, corrupt or not a tokenizer's.
    """
    read = [n for n in TOKENIZER_FILES if listed is None or n in listed]
    there = {n for n in read if os.path.lexists(root / n)}
    if "tokenizer.json" in there:
        there -= {"vocab.json", "merges.txt"}  # tokenizer.json has their content
    for path in (root / name for name in sorted(there)):
        # A broken link must not count as missing: that would mean another length or other tokens.
        if (found := sniff(path)).is_spoilt:
            raise CheckpointError(explain(path, expected="a tokenizer's file", found=found))
    settings = _read_settings(root, there)
    if "tokenizer.json" in there:
        tokenizer = _read_tokenizer_json(root / "tokenizer.json")
    elif {"vocab.json", "merges.txt"} <= there:
        tokenizer = _read_vocab_and_merges(root, settings, there)
    else:
        raise CheckpointError(_missing_files(root))
    special = _special_tokens(settings, tokenizer, root)
    names = {name: token.content for name, token in special.items()}
    if is_clip(tokenizer):
        tokenizer.add_special_tokens([*special.values()])
        frame_prompts(tokenizer, bos_token=names["bos_token"], eos_token=names["eos_token"])
    else:  # tokens in tokenizer.json keep their matching rules
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_special_tokens([t for t in special.values() if t.content not in known])
    length = _max_tokens(settings, tokenizer, root) if max_tokens is None else max_tokens
    _check_frame(tokenizer, length, root)
    return TokenizerFolder(
        tokenizer=tokenizer,
        max_tokens=length,
        special_tokens=names,
        padding_side=_padding_side(settings, tokenizer, root),
    )


def _special_tokens(
    settings: Mapping[str, Any], tokenizer: Tokenizer, root: Path
) -> dict[str, AddedToken]:
    """Return start, end and padding token by name, those that this tokenizer has."""
    usual = CLIP_TOKENS if is_clip(tokenizer) else tokenizer.padding or {}
    special = {
        name: _added_token(settings.get(name), usual.get(name, ""))
        for name in CLIP_TOKENS
        if settings.get(name) is not None or name in usual
    }
    if "pad_token" not in special:
        raise CheckpointError(
            f"{root} names no pad_token, which is needed for short prompts; name a token of the "
            "vocabulary in tokenizer_config.json"
        )
    vocabulary = tokenizer.get_vocab()
    for name, token in special.items():
        # If it were added, its id would be beyond the text encoder's embedding table.
        if token.content not in vocabulary:
            raise CheckpointError(
                f"{root}: {name.removesuffix('_token')} token {token.content!r} is not among the "
                f"{len(vocabulary)} tokens of the vocabulary; the folder's files are of two "
                "tokenizers"
            )
    return special


def _padding_side(
    settings: Mapping[str, Any], tokenizer: Tokenizer, root: Path
) -> Literal["left", "right"]:
    """Return the side on which short prompts are padded.

    Raises CheckpointError for another word, and if long prompts should lose their beginning.
    transformers reads both sides from the same places.
    """
    padding, truncation = tokenizer.padding or {}, tokenizer.truncation or {}
    cut = settings.get("truncation_side") or truncation.get("direction", "right")
    if cut != "right":
        raise CheckpointError(f"{root}: truncation_side is {cut!r}; only 'right' is supported")
    side = settings.get("padding_side") or padding.get("direction", "right")
    if side not in ("left", "right"):
        raise CheckpointError(f"{root}: padding_side is {side!r}; 'left' or 'right' is needed")
    return "left" if side == "left" else "right"


def _check_frame(tokenizer: Tokenizer, max_tokens: int, root: Path) -> None:
    """Raise CheckpointError if a prompt's frame leaves no space or has an unknown token."""
    frame: list[int] = tokenizer.post_process(Encoding()).ids
    if max_tokens <= len(frame):
        raise CheckpointError(
            f"{root}: model_max_length is {max_tokens}; at least {len(frame) + 1} is needed"
        )
    for token_id in frame:
        if tokenizer.id_to_token(token_id) is None:
            raise CheckpointError(
                f"{root}: tokenizer.json puts token {token_id} around prompts, which is not in its "
                "vocabulary; the folder's files are of two tokenizers"
            )


def _read_tokenizer_json(path: Path) -> Tokenizer:
    """Return the tokenizer in a `tokenizer.json`."""
    try:
        return Tokenizer.from_buffer(path.read_bytes())  # any path, UTF-8 or not
    except Exception as error:  # the library raises bare Exception for I/O, JSON and content alike
        raise _unreadable(error, path) from error


def _read_vocab_and_merges(
    root: Path, settings: Mapping[str, Any], there: Collection[str]
) -> Tokenizer:
    """Return the tokenizer of an older folder, with the tokens added to it since."""
    try:
        model = BPE.from_file(
            str(root / "vocab.json"),
            str(root / "merges.txt"),
            unk_token=_added_token(settings.get("unk_token"), EOS_TOKEN).content,
            continuing_subword_prefix="",
            end_of_word_suffix=WORD_END,
        )
    except Exception as error:  # as above
        raise _unreadable(error, root / "vocab.json", root / "merges.txt") from error
    tokenizer = clip_tokenizer(model)
    for index, entry in sorted(_added_entries(root, settings, there).items()):
        token = _added_token(entry, EOS_TOKEN)
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            raise CheckpointError(
                f"{root}: added token {token.content!r} should have id {index} but gets "
                f"{tokenizer.token_to_id(token.content)}; the folder's files are of two tokenizers"
            )
    return tokenizer


def _added_entries(
    root: Path, settings: Mapping[str, Any], there: Collection[str]
) -> dict[int, Any]:
    """Return added tokens by id, from `tokenizer_config.json` or the older `added_tokens.json`."""
    try:
        if "added_tokens_decoder" in settings:
            return {int(key): entry for key, entry in settings["added_tokens_decoder"].items()}
        named = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {_added_token(settings.get(name), EOS_TOKEN).content for name in named}
        return {
            int(key): {"content": token, "special": token in special}
            for token, key in _read_json(root, "added_tokens.json", there).items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{root}: the added tokens cannot be read: {error}") from error


def _read_settings(root: Path, there: Collection[str]) -> dict[str, Any]:
    """Return `tokenizer_config.json`; an older folder's `special_tokens_map.json` overrules it.

    Source: transformers 5.23, `PreTrainedTokenizerBase._from_pretrained`.
    """
    settings = _read_json(root, "tokenizer_config.json", there)
    if "added_tokens_decoder" not in settings:
        settings |= _read_json(root, "special_tokens_map.json", there)
    return settings


def _read_json(root: Path, name: str, there: Collection[str]) -> dict[str, Any]:
    """Return the object in a JSON file, empty when there is no such file."""
    return read_settings(root / name) if name in there else {}


def _added_token(entry: object, default: str) -> AddedToken:
    """Return a token from its two spellings: a string, or an object with matching rules."""
    if isinstance(entry, Mapping) and isinstance(entry.get("content"), str):
        rules = ("lstrip", "rstrip", "single_word", "normalized")
        kept = {rule: bool(entry[rule]) for rule in rules if rule in entry}
        return AddedToken(entry["content"], special=bool(entry.get("special", True)), **kept)
    return AddedToken(entry if isinstance(entry, str) else default, special=True)


def _max_tokens(settings: Mapping[str, Any], tokenizer: Tokenizer, root: Path) -> int:
    """Return the prompt length; transformers writes 1e30 for "not stated".

    Raises CheckpointError when it is not a whole number (NaN and infinities of JSON are not), and
    when it is missing, except for CLIP.
    """
    truncation = tokenizer.truncation or {}
    for given in (settings.get("model_max_length"), truncation.get("max_length")):
        if given is None:
            continue
        is_number = isinstance(given, int | float) and not isinstance(given, bool)
        if is_number and _NOT_STATED <= given < math.inf:
            continue
        if not is_number or (isinstance(given, float) and not given.is_integer()):
            raise CheckpointError(
                f"{root}: model_max_length is {given!r}; a whole number of tokens is needed"
            )
        return int(given)
    if not is_clip(tokenizer):
        raise CheckpointError(
            f"{root} states no model_max_length; write the text encoder's number of tokens per "
            "prompt into tokenizer_config.json"
        )
    log.info("%s states no model_max_length; using CLIP's %d", root, CLIP_MAX_TOKENS)
    return CLIP_MAX_TOKENS


def _missing_files(root: Path) -> str:
    """Return the message about what a tokenizer folder does not have and where it may be."""
    if not root.is_dir():
        return f"tokenizer folder {root} does not exist; give a tokenizer folder"
    nested = sorted(
        path.name
        for path in root.glob("tokenizer*")
        if (path / "tokenizer.json").is_file() or (path / "vocab.json").is_file()
    )
    hint = f"pass subfolder={nested[0]!r}" if nested else "give a tokenizer folder"
    if not nested and any(root.glob("*.model")):
        hint = (
            "transformers can make tokenizer.json from a SentencePiece model: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return f"{root} has neither tokenizer.json nor vocab.json with merges.txt; {hint}"


def _unreadable(error: Exception, *paths: Path) -> CheckpointError:
    """Return the error for files that the library cannot read: what one is, or the reason."""
    for path in paths:
        found = sniff(path)
        if found.is_spoilt:
            return CheckpointError(explain(path, expected="a tokenizer's file", found=found))
    names = " and ".join(path.name for path in paths)
    reason = str(error).partition("\n")[0]
    return CheckpointError(f"{paths[0].parent}: {names} cannot be read: {reason}")
