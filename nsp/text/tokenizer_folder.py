"""Published folders of CLIP tokenizers, in their two generations.

Either `tokenizer.json` or, before it, `vocab.json` + `merges.txt`; special tokens and prompt length
lie beside them.

This file runs in the deployment image: tokenizers, no torch.
"""

import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from nsp.errors import CheckpointError
from nsp.sniff import explain, sniff
from nsp.text.clip_bpe import (
    BOS_TOKEN,
    CLIP_MAX_TOKENS,
    EOS_TOKEN,
    WORD_END,
    clip_tokenizer,
    frame_prompts,
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
    """What a published tokenizer folder says."""

    tokenizer: Tokenizer
    max_tokens: int
    bos_token: str
    eos_token: str
    pad_token: str


def read_tokenizer_folder(root: Path, listed: Collection[str] | None = None) -> TokenizerFolder:
    """Return the CLIP tokenizer in `root` with its special tokens and prompt length.

    With `listed` only files of those names are read: another one beside them, that nobody
    verified, changes nothing. Raises CheckpointError when a file is missing, corrupt or not a CLIP
    tokenizer's.
    """
    read = [n for n in TOKENIZER_FILES if listed is None or n in listed]
    there = {n for n in read if os.path.lexists(root / n)}
    if "tokenizer.json" in there:
        there -= {"vocab.json", "merges.txt"}  # of which it holds the content: not read
    for path in (root / name for name in sorted(there)):
        # Taken for missing, a link to nowhere would mean another length or other tokens.
        if (found := sniff(path)).is_spoilt:
            raise CheckpointError(explain(path, expected="a CLIP tokenizer's file", found=found))
    settings = _read_settings(root, there)
    bos = _added_token(settings.get("bos_token"), BOS_TOKEN)
    eos = _added_token(settings.get("eos_token"), EOS_TOKEN)
    pad = _added_token(settings.get("pad_token"), EOS_TOKEN)
    if "tokenizer.json" in there:
        tokenizer = _read_tokenizer_json(root / "tokenizer.json")
    elif {"vocab.json", "merges.txt"} <= there:
        tokenizer = _read_vocab_and_merges(root, settings, there)
    else:
        raise CheckpointError(_missing_files(root))
    vocabulary = tokenizer.get_vocab()
    for name, token in (("bos", bos), ("eos", eos), ("pad", pad)):
        # Adding it instead would give it an id beyond the text encoder's embedding table.
        if token.content not in vocabulary:
            raise CheckpointError(
                f"{root}: {name} token {token.content!r} is not among the {len(vocabulary)} tokens "
                "of the vocabulary; the folder's files are of two tokenizers"
            )
    tokenizer.add_special_tokens([bos, eos, pad])
    frame_prompts(tokenizer, bos_token=bos.content, eos_token=eos.content)
    return TokenizerFolder(
        tokenizer=tokenizer,
        max_tokens=_max_tokens(settings, tokenizer, root),
        bos_token=bos.content,
        eos_token=eos.content,
        pad_token=pad.content,
    )


def _read_tokenizer_json(path: Path) -> Tokenizer:
    """Return the tokenizer in a `tokenizer.json`, refused when it is not CLIP's kind of BPE."""
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())  # any path, UTF-8 or not
    except Exception as error:  # the library raises bare Exception for I/O, JSON and content alike
        raise _unreadable(error, path) from error
    if not isinstance(tokenizer.model, BPE) or tokenizer.model.end_of_word_suffix != WORD_END:
        raise CheckpointError(
            f"{path} holds a {type(tokenizer.model).__name__} tokenizer without {WORD_END!r} word "
            "ends; give a CLIP tokenizer"
        )
    return tokenizer


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
                f"{root}: added token {token.content!r} should have id {index} and gets "
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

    Raises CheckpointError for one that is no whole number, which JSON's NaN and infinities are not.
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
    log.info("%s states no model_max_length; using CLIP's %d", root, CLIP_MAX_TOKENS)
    return CLIP_MAX_TOKENS


def _missing_files(root: Path) -> str:
    """Return the line that says what a tokenizer folder lacks and where it may be."""
    if not root.is_dir():
        return f"tokenizer folder {root} does not exist; give a CLIP tokenizer folder"
    nested = sorted(
        path.name
        for path in root.glob("tokenizer*")
        if (path / "tokenizer.json").is_file() or (path / "vocab.json").is_file()
    )
    hint = f"pass subfolder={nested[0]!r}" if nested else "give a CLIP tokenizer folder"
    return f"{root} holds neither tokenizer.json nor vocab.json with merges.txt; {hint}"


def _unreadable(error: Exception, *paths: Path) -> CheckpointError:
    """Return the error for files that the library refuses: what one of them is, or its reason."""
    for path in paths:
        found = sniff(path)
        if found.is_spoilt:
            return CheckpointError(explain(path, expected="a CLIP tokenizer's file", found=found))
    names = " and ".join(path.name for path in paths)
    reason = str(error).partition("\n")[0]
    return CheckpointError(f"{paths[0].parent}: {names} cannot be read: {reason}")
