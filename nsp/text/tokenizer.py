"""Prompts to token ids, the way CLIP reads text.

Lowercase byte-level BPE, framed by a start and an end token and padded to a fixed length (Radford
et al. 2021, arXiv:2103.00020, section 2.4). `PromptTokenizer.load` reads the tokenizer folders
published with CLIP and Stable Diffusion; `train_tokenizer` makes a small one from captions. Both
give the ids that transformers gives.

This file runs in the deployment image: numpy and tokenizers, no torch.
"""

import json
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from nsp.errors import CheckpointError, ConfigError, DataError
from nsp.text.clip_bpe import (
    BOS_TOKEN,
    EOS_TOKEN,
    WORD_END,
    clip_tokenizer,
    frame_prompts,
)
from nsp.text.tokenizer_folder import read_tokenizer_folder

log = logging.getLogger(__name__)

_NUM_NAMED = 5  # truncated prompts of one call that get a line of their own

MIN_TOKENS = 3  # start, end and one token between them
MIN_VOCAB_SIZE = 2 * 256 + 2  # each byte inside and at the end of a word, start and end token


class PromptTokenizer:
    """A CLIP tokenizer with a fixed prompt length.

    A special token written out in a prompt becomes that token, as in transformers: "<|endoftext|>",
    and "!" where it is the padding token (second encoder of SDXL).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        bos_token: str = BOS_TOKEN,
        eos_token: str = EOS_TOKEN,
        pad_token: str = EOS_TOKEN,
    ) -> None:
        """Wrap `tokenizer`, whose vocabulary holds the three special tokens."""
        if max_tokens < MIN_TOKENS:
            raise ConfigError(
                f"max_tokens is {max_tokens}; a prompt takes at least {MIN_TOKENS} "
                "(start, one token, end)"
            )
        # Lengths are handled here: the library's truncation would lose the tail we report.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._tokenizer = tokenizer
        self._special = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        self._max_tokens = max_tokens
        self._vocab_size = max(vocabulary.values()) + 1
        self._bos_id, self._eos_id, self._pad_id = (vocabulary[t] for t in self._special.values())

    @property
    def max_tokens(self) -> int:
        """Length T of every encoded prompt, start and end token included."""
        return self._max_tokens

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id: the rows a text encoder's embedding needs."""
        return self._vocab_size

    @property
    def bos_id(self) -> int:
        """Id of the start token."""
        return self._bos_id

    @property
    def eos_id(self) -> int:
        """Id of the end token."""
        return self._eos_id

    @property
    def pad_id(self) -> int:
        """Id that fills a prompt after its end token; often the end token's own."""
        return self._pad_id

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        subfolder: str | None = None,
        listed: Collection[str] | None = None,
    ) -> "PromptTokenizer":
        """Return the tokenizer in a Hugging Face CLIP tokenizer folder; nothing is downloaded.

        Reads `tokenizer.json`, else `vocab.json` and `merges.txt`; special tokens and length come
        from `tokenizer_config.json` and `special_tokens_map.json`. `subfolder` names the tokenizer
        in a pipeline folder ("tokenizer_2"). With `listed` only files of those names are read.
        Raises CheckpointError when a file is missing, corrupt or not a CLIP tokenizer's.
        """
        root = Path(folder) / subfolder if subfolder else Path(folder)
        found = read_tokenizer_folder(root, listed)
        if found.max_tokens < MIN_TOKENS:
            raise CheckpointError(
                f"{root}: model_max_length is {found.max_tokens}; at least {MIN_TOKENS} is needed"
            )
        return cls(
            found.tokenizer,
            max_tokens=found.max_tokens,
            bos_token=found.bos_token,
            eos_token=found.eos_token,
            pad_token=found.pad_token,
        )

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as transformers reads them too."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_tokens,
            "unk_token": self._tokenizer.model.unk_token or self._special["eos_token"],
            **self._special,
        }
        _write(root / "tokenizer.json", self._tokenizer.to_str())
        _write(root / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def encode(self, prompts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return token ids (B, T): start, prompt, end, padding.

        A prompt that does not fit loses its tail, not its end token; a warning names both (of many
        such prompts, the first few and their number).
        """
        if isinstance(prompts, str):
            raise TypeError(f"encode takes a list of prompts: encode([{prompts[:20]!r}])")
        token_ids_BT = np.full((len(prompts), self.max_tokens), self.pad_id, dtype=np.int64)
        num_cut = 0
        for row_T, prompt in zip(token_ids_BT, prompts, strict=True):
            ids, tail = self._fit(prompt)
            row_T[: len(ids) + 2] = [self.bos_id, *ids, self.eos_id]
            if tail is None:
                continue
            num_cut += 1
            if num_cut <= _NUM_NAMED:
                log.warning(
                    "prompt %r is longer than %d tokens; dropped %r",
                    _shortened(prompt, 60),
                    self.max_tokens - 2,
                    _shortened(tail, 200),
                )
        if num_cut > _NUM_NAMED:
            log.warning("and %d more prompts of %d", num_cut - _NUM_NAMED, len(prompts))
        return token_ids_BT

    def truncated(self, prompt: str) -> str | None:
        """Return the tail of `prompt` that `encode` drops, or None when all of it fits."""
        return self._fit(prompt)[1]

    def _fit(self, prompt: str) -> tuple[list[int], str | None]:
        """Return the ids that fit between start and end token, and the text that does not."""
        text = _without_lone_surrogates(prompt)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        room = self.max_tokens - 2
        if len(ids) <= room:
            return ids, None
        return ids[:room], text[encoding.offsets[room][0] :]


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
            f"vocab_size is {vocab_size}; it takes at least {MIN_VOCAB_SIZE} "
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
    """Return the pairs to merge, most frequent first: as many as `vocab_size` can hold, or more."""
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
    """Return `text` with half surrogates (bad bytes of a command line) as U+FFFD, to be UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _write(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
