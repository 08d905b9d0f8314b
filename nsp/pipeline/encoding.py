"""Prompts read by the text encoder, once each: a batch of orders takes what it needs from here."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nsp.family.order import Encoded
from nsp.stage.backend import Backend

if TYPE_CHECKING:
    from nsp.text.tokenizer import PromptTokenizer

STAGE = "text_encoder"
_KEPT = 256  # prompts: 60 MB at the width of CLIP ViT-L/14


class PromptEncoder:
    """Tokenizer and text encoder of one model, with the last prompts it read."""

    def __init__(
        self, tokenizer: "PromptTokenizer", backend: Backend, *, max_batch: int | None
    ) -> None:
        self._tokenizer, self._backend, self._max_batch = tokenizer, backend, max_batch
        self._kept: OrderedDict[bytes, Mapping[str, NDArray[Any]]] = OrderedDict()
        self._empty: bytes | None = None

    def encode(self, prompts: Sequence[str], nulls: Sequence[str | None]) -> Encoded:
        """Return the prompts of a batch, and the null prompts of those images that have one."""
        has_null = np.array([null is not None for null in nulls])
        rows = [*prompts]
        if has_null.any():  # a row for every image, so that few shapes occur
            both = zip(prompts, nulls, strict=True)
            rows += [prompt if null is None else null for prompt, null in both]
        ids = self._tokenizer.encode(rows)
        keys = [row.tobytes() for row in ids]
        if self._empty is None:
            self._empty = self._tokenizer.encode([""]).tobytes()
        self._read(dict(zip(keys, ids, strict=True)))
        found = [self._kept[key] for key in keys]
        states = {name: np.stack([each[name] for each in found]) for name in found[0]}
        empty = np.array([key == self._empty for key in keys[: len(prompts)]])
        self._forget()
        return Encoded(states, empty, has_null)

    def forget(self) -> None:
        """Drop all that was read."""
        self._kept.clear()

    def _forget(self) -> None:
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)

    def _read(self, prompts: Mapping[bytes, NDArray[np.int64]]) -> None:
        """Read those that are not kept; all become the last ones."""
        unread = [key for key in prompts if key not in self._kept]
        size = self._max_batch or max(len(unread), 1)
        for start in range(0, len(unread), size):
            keys = unread[start : start + size]
            ids = np.stack([prompts[key] for key in keys])
            found = self._backend.run(STAGE, {"token_ids": self._backend.upload(ids)})
            host = {name: self._backend.download(array) for name, array in found.items()}
            for row, key in enumerate(keys):
                self._kept[key] = {name: array[row] for name, array in host.items()}
        for key in prompts:
            self._kept.move_to_end(key)
