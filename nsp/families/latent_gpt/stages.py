"""The stages of the family `latent_gpt`: their tensors and which weights may be narrow.

Free axes: those of nsp/raster/stages.py, and N encoded prompts. An fp16 or bf16 export narrows
matrix products and convolutions, and with them keys, values and the attention between. Norms, the
residual stream, embeddings, logits, guidance, sampling and the codebook stay float32.
"""

from collections.abc import Mapping

from nsp.families.latent_gpt.config import LatentGptConfig, TextCondition
from nsp.family.contract import Stage
from nsp.raster.stages import decode_stage, decoder_stage, needs_nucleus_stage, nucleus_stage
from nsp.stage.io import Axes, StageIO

_BLOCK = "gpt.blocks.*"
_HALF = (f"{_BLOCK}.attn.*", f"{_BLOCK}.ffn.*", "gpt.head.*")
_CROSS = (f"{_BLOCK}.cross.q.*", f"{_BLOCK}.cross.proj.*")
_FULL = (
    f"{_BLOCK}.norm*",
    f"{_BLOCK}.cross_norm.*",
    "gpt.norm.*",
    "gpt.token_embedding.*",
    "gpt.position_embedding.*",
)


def stages(config: LatentGptConfig, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
    """Return every stage, in data-path order; `dtype` is that of keys and values."""
    grid, found = config.grid, dict[str, Stage]()
    carried, half = _text_keys(config, dtype), [*_HALF]
    if config.text is not None:
        half += _CROSS
        found["text_encoder"] = _text_encoder(config.text)
        found["condition"] = _condition(config.text, carried)
    found["decode"] = decode_stage(
        grid, kv_layout=kv_layout, dtype=dtype, carried=carried, half=tuple(half), full=_FULL
    )
    if needs_nucleus_stage(grid, kv_layout):
        found["nucleus"] = nucleus_stage(grid)
    return {**found, "decoder": decoder_stage(grid, config.vq)}


def _text_keys(config: LatentGptConfig, dtype: str) -> dict[str, Axes]:
    """Return the text's keys and values in every block, once per prompt; rows first."""
    if config.text is None:
        return {}
    length, heads, width = config.text.max_tokens, config.gpt.num_heads, config.gpt.head_width
    shapes = {"k": f"G {heads} {width} {length}", "v": f"G {heads} {length} {width}"}
    return {
        f"cross_{kind}_{i}": Axes(shape, dtype)
        for i in range(config.gpt.depth)
        for kind, shape in shapes.items()
    }


def _text_encoder(text: TextCondition) -> Stage:
    """Prompt tokens -> CLIP's states after the last norm."""
    io = StageIO(
        {"token_ids": Axes(f"N {text.max_tokens}", "int64")},
        {"text_states": Axes(f"N {text.max_tokens} {text.text_width}")},
    )
    return Stage(io=io, full=("text_encoder.*",))


def _condition(text: TextCondition, carried: Mapping[str, Axes]) -> Stage:
    """Encoded prompts, and the one of every row -> its keys and values; row N is the null one."""
    states = Axes(f"N {text.max_tokens} {text.text_width}")
    io = StageIO({"text_states": states, "prompts": Axes("G", "int64")}, carried)
    return Stage(io=io, half=(f"{_BLOCK}.cross.kv.*",), full=("gpt.null_context",))
