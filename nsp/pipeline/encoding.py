"""Encodes prompts with the text encoder, once each, for all batches of orders.

The stage `text_encoder` takes `token_ids` (N, T) int64 and, where it declares it, `attention_mask`
(N, T) int64, with 0 for padding.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nsp.family.order import Encoded
from nsp.stage.backend import Backend

if TYPE_CHECKING:
    from nsp.text.tokenizer import PromptTokenizer, TokenizedPrompts

STAGE = "text_encoder"
_KEPT = 256  # prompts: 60 MB at the width of CLIP ViT-L/14


class PromptEncoder:
    """Tokenizer and text encoder of one model, with the last encoded prompts."""

    def __init__(
        self, tokenizer: "PromptTokenizer", backend: Backend, *, max_batch: int | None
    ) -> None:
        self._tokenizer, self._backend, self._max_batch = tokenizer, backend, max_batch
        self._kept: OrderedDict[bytes, Mapping[str, NDArray[Any]]] = OrderedDict()
        self._empty: bytes | None = None

    def encode(self, prompts: Sequence[str], nulls: Sequence[str | None]) -> Encoded:
        """Return the encoded prompts of a batch, and the null prompts of images that have one."""
        has_null = np.array([null is not None for null in nulls])
        rows = [*prompts]
        if has_null.any():  # a row for every image, to keep the number of shapes small
            both = zip(prompts, nulls, strict=True)
            rows += [prompt if null is None else null for prompt, null in both]
        tokens = self._tokenizer.tokenize(rows)
        feeds = self._feeds(tokens)
        keys = _keys(feeds)
        if self._empty is None:
            (self._empty,) = _keys(self._feeds(self._tokenizer.tokenize([""])))
        self._read(feeds, {key: row for row, key in enumerate(keys)})
        found = [self._kept[key] for key in keys]
        states = {name: np.stack([each[name] for each in found]) for name in found[0]}
        empty = np.array([key == self._empty for key in keys[: len(prompts)]])
        self._forget()
        return Encoded(states, tokens.mask, empty, has_null)

    def forget(self) -> None:
        """Delete all encoded prompts."""
        self._kept.clear()

    def _forget(self) -> None:
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)

    def _feeds(self, tokens: "TokenizedPrompts") -> dict[str, NDArray[np.int64]]:
        """Return the inputs of the stage."""
        known = {"token_ids": tokens.token_ids, "attention_mask": tokens.mask}
        declared = self._backend.stages_io[STAGE].inputs
        return {name: array for name, array in known.items() if name in declared}

    def _read(self, feeds: Mapping[str, NDArray[np.int64]], prompts: Mapping[bytes, int]) -> None:
        """Encode the prompts that are not kept yet; all of them become the last ones."""
        unread = [key for key in prompts if key not in self._kept]
        size = self._max_batch or max(len(unread), 1)
        for start in range(0, len(unread), size):
            keys = unread[start : start + size]
            rows = [prompts[key] for key in keys]
            uploaded = {name: self._backend.upload(each[rows]) for name, each in feeds.items()}
            found = self._backend.run(STAGE, uploaded)
            host = {name: self._backend.download(array) for name, array in found.items()}
            for place, key in enumerate(keys):
                self._kept[key] = {name: array[place] for name, array in host.items()}
        for key in prompts:
            self._kept.move_to_end(key)


def _keys(feeds: Mapping[str, NDArray[np.int64]]) -> list[bytes]:
    """Return a key for each prompt: all that the stage receives of it."""
    return [b"".join(row.tobytes() for row in rows) for rows in zip(*feeds.values(), strict=True)]
