"""The stages of the family `next_patch`: their tensors and which weights may be narrow.

Free axes: those of nsp/raster/stages.py, and N encoded prompts. An fp16 or bf16 export narrows
matrix products and convolutions, and with them keys, values and the attention between. Norms, the
residual stream, rotations, embeddings, logits, guidance, sampling and the codebook stay float32.
"""

from collections.abc import Mapping

from nsp.families.next_patch.config import CaptionCondition, NextPatchConfig
from nsp.family.contract import Stage
from nsp.raster.stages import (
    decode_stage,
    decoder_stage,
    needs_nucleus_stage,
    nucleus_stage,
    prefill_stage,
)
from nsp.stage.io import Axes, StageIO

_HALF = (
    "gpt.layers.*.attention.wqkv.*",
    "gpt.layers.*.attention.wo.*",
    "gpt.layers.*.feed_forward.*",
    "gpt.output.*",
)
_FULL = ("gpt.layers.*norm.*", "gpt.norm.*")
_CODES = ("gpt.tok_embeddings.*",)


def stages(config: NextPatchConfig, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
    """Return every stage, in data-path order; `dtype` is that of keys and values."""
    grid, caption = config.grid, config.caption
    found: dict[str, Stage] = {}
    carried = {}
    start: tuple[str, ...] = ("gpt.cls_embedding.*",)  # the condition is the first token
    if caption is not None:
        carried, start = {"first": Axes("G", "int64")}, ()
        found["text_encoder"] = _text_encoder(caption)
        found["prefill"] = prefill_stage(
            grid,
            kv_layout=kv_layout,
            dtype=dtype,
            prefix=_prefix(caption),
            half=(*_HALF, "gpt.cls_embedding.cap_proj.*"),
            full=(*_FULL, "gpt.cls_embedding.uncond_embedding"),
        )
    full = (*_FULL, *_CODES, *start)
    found["decode"] = decode_stage(
        grid, kv_layout=kv_layout, dtype=dtype, carried=carried, half=_HALF, full=full
    )
    if needs_nucleus_stage(grid, kv_layout):
        found["nucleus"] = nucleus_stage(grid)
    return {**found, "decoder": decoder_stage(grid, config.vq)}


def _text_encoder(caption: CaptionCondition) -> Stage:
    """Prompt tokens -> T5 states; those of padding are zero."""
    tokens, width = caption.max_tokens, caption.text_width
    ids = Axes(f"N {tokens}", "int64")
    io = StageIO(
        {"token_ids": ids, "attention_mask": ids}, {"text_states": Axes(f"N {tokens} {width}")}
    )
    return Stage(io=io, full=("text_encoder.*",))


def _prefix(caption: CaptionCondition) -> dict[str, Axes]:
    """Encoded prompts, the one of every row, and the first position that is not padding.

    Row N is the null condition.
    """
    return {
        "text_states": Axes(f"N {caption.max_tokens} {caption.text_width}"),
        "prompts": Axes("G", "int64"),
        "first": Axes("G", "int64"),
    }
