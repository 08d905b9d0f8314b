"""Prompts reach the text encoder as it declares them, and the family as they were read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from nsp.pipeline.encoding import PromptEncoder
from nsp.stage.arena import Array
from nsp.stage.backend import Backend
from nsp.stage.io import Axes, Shape, StageIO
from nsp.text.tokenizer import PromptTokenizer
from tests.text.prompt_tokenizers import T5_TOKENS, WORD_TOKENS, save, t5_like, word_level

MAX_TOKENS = 8
Side = Literal["left", "right"]


class MeanBackend(Backend):
    """A text encoder in NumPy: every token's state is its id, the summary their masked mean."""

    name = "mean"
    kv_layout = "delta"

    def __init__(self, *, masked: bool) -> None:
        inputs = {"token_ids": Axes(f"N {MAX_TOKENS}", "int64")}
        if masked:
            inputs["attention_mask"] = Axes(f"N {MAX_TOKENS}", "int64")
        outputs = {"text_states": Axes(f"N {MAX_TOKENS} 1"), "text_pooled": Axes("N 1")}
        super().__init__({"text_encoder": StageIO(inputs=inputs, outputs=outputs)})
        self.batches: list[int] = []

    def run(
        self, stage: str, feeds: Mapping[str, Array], outputs: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        self.stages_io[stage].check(feeds, stage)
        ids: NDArray[Any] = np.asarray(feeds["token_ids"])
        mask: NDArray[Any] = np.asarray(feeds.get("attention_mask", np.ones_like(ids)))
        self.batches.append(len(ids))
        mean = (ids * mask).sum(axis=1, keepdims=True) / mask.sum(axis=1, keepdims=True)
        return {
            "text_states": ids[:, :, None].astype(np.float32),
            "text_pooled": mean.astype(np.float32),
        }

    def upload(self, array: NDArray[Any]) -> Array:
        return array.copy()

    def download(self, array: Array) -> NDArray[Any]:
        return np.array(array)

    def allocate(self, shape: Shape, dtype: str) -> Array:
        raise NotImplementedError

    def copy_rows(self, source: Array, target: Array) -> None:
        raise NotImplementedError


def t5_tokenizer(folder: Path, side: Side = "right") -> PromptTokenizer:
    save(t5_like(), folder, T5_TOKENS, max_tokens=MAX_TOKENS, padding_side=side)
    return PromptTokenizer.load(folder)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_stage_that_declares_a_mask_gets_it_and_the_family_sees_it(
    side: Side, tmp_path: Path
) -> None:
    tokenizer = t5_tokenizer(tmp_path, side)
    backend = MeanBackend(masked=True)
    prompts, nulls = ["red", "", "red"], [None, "apple", None]
    text = PromptEncoder(tokenizer, backend, max_batch=2).encode(prompts, nulls)
    rows = ["red", "", "red", "red", "apple", "red"]
    expected = tokenizer.tokenize(rows)
    assert backend.batches == [2, 1]  # three distinct prompts, two at a time
    assert (text.mask == expected.mask).all()
    assert text.mask.dtype == np.int64
    assert (text.states["text_states"][:, :, 0] == expected.token_ids).all()
    for row, pooled in enumerate(text.states["text_pooled"][:, 0]):
        read = expected.token_ids[row][expected.mask[row] == 1]
        assert pooled == pytest.approx(read.mean())
    assert text.empty.tolist() == [False, True, False]
    assert text.has_null.tolist() == [False, True, False]


def test_a_stage_without_a_mask_gets_ids_alone(tmp_path: Path) -> None:
    tokenizer = t5_tokenizer(tmp_path)
    prompt_encoder = PromptEncoder(tokenizer, MeanBackend(masked=False), max_batch=None)
    text = prompt_encoder.encode(["red"], [None])
    (ids,) = tokenizer.encode(["red"])
    assert text.states["text_pooled"][0, 0] == pytest.approx(ids.mean())
    assert (text.mask == tokenizer.tokenize(["red"]).mask).all()


def test_prompts_of_equal_ids_and_other_masks_are_read_apart(tmp_path: Path) -> None:
    save(word_level(), tmp_path, WORD_TOKENS, max_tokens=MAX_TOKENS)
    tokenizer = PromptTokenizer.load(tmp_path)
    prompts = ["apple", "apple [PAD]"]  # the padding token, written out: a word like others
    for masked, num_read in ((True, 2), (False, 1)):
        backend = MeanBackend(masked=masked)
        prompt_encoder = PromptEncoder(tokenizer, backend, max_batch=None)
        prompt_encoder.encode(prompts, [None, None])
        assert backend.batches == [num_read]
        prompt_encoder.encode(prompts[::-1], [None, None])
        assert backend.batches == [num_read]  # kept
