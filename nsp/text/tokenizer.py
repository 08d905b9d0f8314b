"""Prompts to token ids, with any tokenizer that the library `tokenizers` loads.

A tokenizer adds its frame to a prompt (CLIP a start and an end token: Radford et al. 2021,
arXiv:2103.00020, section 2.4; T5 an end token) and fills it up to a fixed length.
`PromptTokenizer.load` reads published folders; `train_tokenizer` makes a small one of CLIP's kind
from captions. Both give the ids that transformers gives.

This file runs in the deployment image: numpy and tokenizers, no torch.
"""

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer
from tokenizers.trainers import BpeTrainer

from nsp.errors import ConfigError, DataError
from nsp.text.clip_bpe import (
    BOS_TOKEN,
    CLIP_TOKENS,
    EOS_TOKEN,
    WORD_END,
    clip_tokenizer,
    frame_prompts,
    is_clip,
)
from nsp.text.tokenizer_folder import read_tokenizer_folder

log = logging.getLogger(__name__)

_NUM_NAMED = 5  # truncated prompts of one call with a log line each

MIN_VOCAB_SIZE = 2 * 256 + 2  # each byte inside and at the end of a word, start and end token


@dataclass(frozen=True)
class TokenizedPrompts:
    """Input of a text encoder: N prompts of T tokens, including padding."""

    token_ids: NDArray[np.int64]  # (N, T)
    mask: NDArray[np.int64]  # (N, T): 1 for tokens of the prompt and its frame, 0 for padding


class PromptTokenizer:
    """A tokenizer with a fixed prompt length.

    A special token written out in a prompt becomes that token, as in transformers: "<|endoftext|>",
    and "!" where it is the padding token (second encoder of SDXL).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        special_tokens: Mapping[str, str] = CLIP_TOKENS,
        padding_side: Literal["left", "right"] = "right",
    ) -> None:
        """Wrap `tokenizer`, whose vocabulary holds the special tokens.

        Those are named as in `tokenizer_config.json`: "pad_token", and "bos_token" and "eos_token"
        where the tokenizer has them.
        """
        # Lengths are handled here: the library's truncation would lose the tail that we report.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._num_framing = len(tokenizer.post_process(Encoding()))
        if max_tokens <= self._num_framing:
            raise ConfigError(
                f"max_tokens is {max_tokens}, but a prompt needs at least {self._num_framing + 1}: "
                f"{self._num_framing} for its frame and one for its text"
            )
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._tokenizer = tokenizer
        self._special = dict(special_tokens)
        self._padding_side: Literal["left", "right"] = padding_side
        self._max_tokens = max_tokens
        self._vocab_size = max(vocabulary.values()) + 1
        self._ids = {name: vocabulary[token] for name, token in special_tokens.items()}

    @property
    def max_tokens(self) -> int:
        """Length T of every encoded prompt, frame included."""
        return self._max_tokens

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """Where short prompts are filled up."""
        return self._padding_side

    def padded_left(self) -> "PromptTokenizer":
        """Return the same tokenizer with padding before the prompts."""
        return PromptTokenizer(
            self._tokenizer,
            max_tokens=self._max_tokens,
            special_tokens=self._special,
            padding_side="left",
        )

    def after(self, rules: Sequence[Normalizer]) -> "PromptTokenizer":
        """Return a tokenizer that changes prompts by these rules before its own ones.

        They are stored with the tokenizer, so that engines follow them, too.
        """
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        own = tokenizer.normalizer
        tokenizer.normalizer = normalizers.Sequence([*rules, *([] if own is None else [own])])
        return PromptTokenizer(
            tokenizer,
            max_tokens=self._max_tokens,
            special_tokens=self._special,
            padding_side=self._padding_side,
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id: the rows a text encoder's embedding needs."""
        return self._vocab_size

    @property
    def bos_id(self) -> int | None:
        """Id of the start token; None for a tokenizer without one, such as T5's."""
        return self._ids.get("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the end token; None for a tokenizer without one."""
        return self._ids.get("eos_token")

    @property
    def pad_id(self) -> int:
        """Id that fills up a prompt; often it is that of the end token."""
        return self._ids["pad_token"]

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        subfolder: str | None = None,
        listed: Collection[str] | None = None,
        max_tokens: int | None = None,
    ) -> "PromptTokenizer":
        """Return the tokenizer in a Hugging Face tokenizer folder; nothing is downloaded.

        Reads `tokenizer.json`, or CLIP's `vocab.json` and `merges.txt`; special tokens, padding
        side and length come from `tokenizer_config.json` and `special_tokens_map.json`.
        `subfolder` names the tokenizer in a pipeline folder ("tokenizer_2"). With `listed` only
        files of those names are read. `max_tokens` replaces the length in the folder if a model
        needs another one. Raises CheckpointError when a file is missing, corrupt or not a
        tokenizer's.
        """
        root = Path(folder) / subfolder if subfolder else Path(folder)
        found = read_tokenizer_folder(root, listed, max_tokens)
        return cls(
            found.tokenizer,
            max_tokens=found.max_tokens,
            special_tokens=found.special_tokens,
            padding_side=found.padding_side,
        )

    def reads_as(self, other: "PromptTokenizer") -> bool:
        """Return whether another tokenizer has the same tokens; it may pad with another one."""
        own, its = (
            (each.max_tokens, each.bos_id, each.eos_id, each.padding_side) for each in (self, other)
        )
        return own == its and self._tokenizer.get_vocab() == other._tokenizer.get_vocab()

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as transformers reads them too."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        config: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_tokens,
            "padding_side": self._padding_side,
        }
        if is_clip(self._tokenizer):  # transformers builds these again from the vocabulary
            unknown = self._tokenizer.model.unk_token or self._special["eos_token"]
            config |= {"tokenizer_class": "CLIPTokenizer", "unk_token": unknown}
        _write(root / "tokenizer.json", self._tokenizer.to_str())
        text = json.dumps(config | self._special, indent=2)
        _write(root / "tokenizer_config.json", text + "\n")

    def encode(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Return token ids (N, T), like `tokenize`."""
        return self.tokenize(prompts).token_ids

    def tokenize(self, prompts: Sequence[str]) -> TokenizedPrompts:
        """Return token ids and mask of framed and padded prompts.

        A prompt that does not fit loses its tail, not its end token; a warning names both (of many
        such prompts, the first few and their number). Raises ConfigError for a prompt that this
        tokenizer cannot read.
        """
        if isinstance(prompts, str):
            raise TypeError(f"encode takes a list of prompts: encode([{prompts[:20]!r}])")
        shape = (len(prompts), self.max_tokens)
        token_ids_NT = np.full(shape, self.pad_id, dtype=np.int64)
        mask_NT = np.zeros(shape, dtype=np.int64)
        num_cut = 0
        for row, prompt in enumerate(prompts):
            ids, tail = self._fit(prompt)
            start = self.max_tokens - len(ids) if self._padding_side == "left" else 0
            token_ids_NT[row, start : start + len(ids)] = ids
            mask_NT[row, start : start + len(ids)] = 1
            if tail is None:
                continue
            num_cut += 1
            if num_cut <= _NUM_NAMED:
                log.warning(
                    "prompt %r is longer than %d tokens, counting %d for its start and end; "
                    "dropped %r",
                    _shortened(prompt, 60),
                    self.max_tokens,
                    self._num_framing,
                    _shortened(tail, 200),
                )
        if num_cut > _NUM_NAMED:
            log.warning("and %d more prompts of %d", num_cut - _NUM_NAMED, len(prompts))
        return TokenizedPrompts(token_ids_NT, mask_NT)

    def truncated(self, prompt: str) -> str | None:
        """Return the tail of `prompt` that `encode` drops, or None when all of it fits."""
        return self._fit(prompt)[1]

    def _fit(self, prompt: str) -> tuple[list[int], str | None]:
        """Return the ids of the part of a prompt that fits, with its frame, and the rest's text."""
        text = _without_lone_surrogates(prompt)
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises this without a token for unknown text
            raise ConfigError(
                f"the model's tokenizer cannot read the prompt {_shortened(prompt, 60)!r}: {error}"
            ) from error
        room, tail = self.max_tokens - self._num_framing, None
        if len(encoding) > room:
            tail = text[encoding.offsets[room][0] :]
            encoding.truncate(room)
        framed: list[int] = self._tokenizer.post_process(encoding).ids
        return framed, tail


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int, max_tokens: int
) -> PromptTokenizer:
    """Return a tokenizer learnt from `captions`; the same captions give the same tokenizer.

    The vocabulary is laid out like CLIP's: 256 bytes, 256 bytes that end a word, merges, start,
    end. So any text can be encoded, and the end token has the largest id. It stays smaller than
    `vocab_size` (at least 514) when no further pair occurs twice in the captions. Raises DataError
    when there are no captions.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size is {vocab_size}, but must be at least {MIN_VOCAB_SIZE} "
            "(256 bytes inside a word, 256 at its end, start and end token)"
        )
    vocabulary = {token: index for index, token in enumerate(_byte_tokens())}
    merges: list[tuple[str, str]] = []
    for left, right in _learn_merges(captions, vocab_size=vocab_size):
        # Two merges may spell the same token; both are needed, the token counts once.
        if left + right not in vocabulary:
            if len(vocabulary) == vocab_size - 2:
                break
            vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
    for token in (BOS_TOKEN, EOS_TOKEN):
        vocabulary[token] = len(vocabulary)
    log.info("trained a tokenizer: %d of %d vocabulary entries", len(vocabulary), vocab_size)
    model = BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=EOS_TOKEN,
        continuing_subword_prefix="",
        end_of_word_suffix=WORD_END,
    )
    tokenizer = clip_tokenizer(model)
    tokenizer.add_special_tokens([BOS_TOKEN, EOS_TOKEN])
    frame_prompts(tokenizer, bos_token=BOS_TOKEN, eos_token=EOS_TOKEN)
    return PromptTokenizer(tokenizer, max_tokens=max_tokens)


def _learn_merges(captions: Iterable[str], *, vocab_size: int) -> list[tuple[str, str]]:
    """Return the pairs to merge, most frequent first: at least as many as `vocab_size` needs."""
    texts = [_without_lone_surrogates(caption) for caption in captions]
    if not any(text.strip() for text in texts):
        raise DataError("no captions to train a tokenizer on; give at least one that is not empty")
    byte_tokens = _byte_tokens()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=byte_tokens[:256],
        # Word-final bytes would be numbered in hash order, and ties between pairs broken by that
        # number (huggingface/tokenizers issue 1794). As special tokens they are numbered in order.
        special_tokens=byte_tokens[256:],
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner = clip_tokenizer(BPE())
    learner.train_from_iterator(texts, trainer=trainer)
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def _byte_tokens() -> list[str]:
    """Return CLIP's tokens 0 to 511: the characters that stand for bytes, then those with `</w>`.

    Printable Latin-1 stands for itself and comes first, other bytes are U+0100 onwards; both runs
    ascend, so sorting the library's unordered alphabet gives CLIP's order.
    """
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return characters + [character + WORD_END for character in characters]


def _without_lone_surrogates(text: str) -> str:
    """Return `text` as valid UTF-8: lone surrogates (bad bytes of a command line) as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _write(path: Path, text: str) -> None:
    """Write `path` completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
