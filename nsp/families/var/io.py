"""The stages of the family `var` and their tensors.

Free axes: B images, G transformer rows (B, or 2B with the null condition behind the condition), N
encoded prompts, L tokens of this scale, P cached tokens, R logits that are sorted for top-k and
top-p, p q this scale's grid, r c the next scale's grid. Fixed numbers in the declarations come from
the configuration: width, heads, blocks, codes, latent channels.
"""

from nsp.families.var.config import VarConfig
from nsp.stage.backend import TENSORRT_RANKS
from nsp.stage.io import Axes, StageIO


def needs_nucleus_stages(config: VarConfig, kv_layout: str) -> bool:
    """Return whether there are stages that draw by top-p alone without sorting all codes.

    Only TensorRT, which has this layout, cannot sort so many.
    """
    return kv_layout == "delta" and config.vae.vocab_size > TENSORRT_RANKS


def stages_io(config: VarConfig, kv_layout: str, dtype: str) -> dict[str, StageIO]:
    """Return the declaration of every stage, in data-path order.

    `dtype` is that of keys and values.
    """
    stages = {
        "condition": _condition(config, dtype),
        "step": _step(config, kv_layout, dtype),
        "select": _select(config, smooth=False),
        "select_smooth": _select(config, smooth=True),
        **_select_nucleus(config, kv_layout),
        "accumulate": _accumulate(config),
        "decoder": _decoder(config),
    }
    if config.text is None:
        return stages
    tokens, width = config.text.max_tokens, config.text.text_width
    text_encoder = StageIO(
        inputs={"token_ids": Axes(f"N {tokens}", "int64")},
        outputs={"text_states": Axes(f"N {tokens} {width}"), "text_pooled": Axes(f"N {width}")},
    )
    return {"text_encoder": text_encoder, **stages}


def _conditioning(config: VarConfig, dtype: str) -> dict[str, Axes]:
    """Return what `condition` hands to every `step`."""
    predictor = config.predictor
    depth, width = predictor.depth, predictor.width
    tensors = {
        "modulation": Axes(f"{depth} G 6 {width}"),
        "head_modulation": Axes(f"G 2 {width}"),
    }
    if config.text is not None:
        heads = f"{predictor.num_heads} {predictor.head_width}"
        for name in ("text_k", "text_v"):
            tensors[name] = Axes(f"{depth} G {config.text.max_tokens} {heads}", dtype)
    return tensors


def _condition(config: VarConfig, dtype: str) -> StageIO:
    """Class ids, or rows of encoded prompts -> all that is computed once per image.

    Row N is the null condition where that is learned.
    """
    inputs = {"class_ids": Axes("G", "int64")}
    if config.text is not None:
        tokens, width = config.text.max_tokens, config.text.text_width
        inputs = {
            "text_states": Axes(f"N {tokens} {width}"),
            "text_pooled": Axes(f"N {width}"),
            "rows": Axes("G", "int64"),
        }
    start = Axes(f"G {config.patch_nums[0] ** 2} {config.predictor.width}")
    return StageIO(inputs=inputs, outputs={"x": start, **_conditioning(config, dtype)})


def _step(config: VarConfig, kv_layout: str, dtype: str) -> StageIO:
    """Tokens of one scale and the cache -> logits and new keys and values.

    New is what the cache grows by (layout "delta") or what it becomes ("present").
    """
    predictor = config.predictor
    heads, head_width = predictor.num_heads, predictor.head_width
    delta = kv_layout == "delta"
    past = f"P G {heads} {head_width}" if delta else f"G {heads} P {head_width}"
    new = f"L G {heads} {head_width}" if delta else f"G {heads} P+L {head_width}"
    cache = [f"{kind}_{i}" for i in range(predictor.depth) for kind in ("k", "v")]
    return StageIO(
        inputs={
            "x": Axes(f"G L {predictor.width}"),
            "positions": Axes("L", "int64"),
            **_conditioning(config, dtype),
            **{f"past_{name}": Axes(past, dtype) for name in cache},
        },
        outputs={
            "logits": Axes(f"G L {config.vae.vocab_size}"),
            **{f"new_{name}": Axes(new, dtype) for name in cache},
        },
    )


def _select(config: VarConfig, *, smooth: bool) -> StageIO:
    """Logits and one uniform number per token -> tokens and their code vectors.

    `forced` holds a token to take instead of the sampled one, or -1; `tokens` are those sampled.
    Every image has its own settings. `ranks` counts from 0 to what must be sorted for them all.
    """
    codes, channels = config.vae.vocab_size, config.vae.latent_channels
    inputs = {
        "logits": Axes(f"G L {codes}"),
        "uniforms": Axes("B L"),
        "forced": Axes("B L", "int64"),
        "guidance": Axes("B"),  # 1: off
        "temperature": Axes("B"),
        "top_p": Axes("B"),  # 1: off
        "top_k": Axes("B", "int64"),  # 0: off
        "ranks": Axes("R", "int64"),
    }
    if smooth:
        inputs |= {"gumbel": Axes(f"B L {codes}"), "ratio": Axes("")}
    outputs = {
        "tokens": Axes("B L", "int64"),
        "codes": Axes(f"B L {channels}"),
        "guided": Axes(f"B L {codes}"),
    }
    return StageIO(inputs=inputs, outputs=outputs)


def _select_nucleus(config: VarConfig, kv_layout: str) -> dict[str, StageIO]:
    """The selections once more, without sorting for top-p: `ranks` is for top-k alone."""
    if not needs_nucleus_stages(config, kv_layout):
        return {}
    return {
        "select_nucleus": _select(config, smooth=False),
        "select_smooth_nucleus": _select(config, smooth=True),
    }


def _accumulate(config: VarConfig) -> StageIO:
    """Code vectors of one scale and the running latent -> new latent, next scale's input tokens."""
    channels, side = config.vae.latent_channels, config.latent_side
    latent = Axes(f"B {channels} {side} {side}")
    return StageIO(
        inputs={
            "codes": Axes(f"B p q {channels}"),
            "latent": latent,
            "up_rows": Axes(f"{side} p"),
            "up_cols": Axes(f"{side} q"),
            "down_rows": Axes(f"r {side}"),
            "down_cols": Axes(f"c {side}"),
            "phi": Axes("", "int64"),
            "rows": Axes("G", "int64"),
        },
        outputs={"new_latent": latent, "x": Axes(f"G r*c {config.predictor.width}")},
    )


def _decoder(config: VarConfig) -> StageIO:
    """The finished latent -> pixels in [0, 1]."""
    side, size_px = config.latent_side, config.image_size_px
    return StageIO(
        inputs={"latent": Axes(f"B {config.vae.latent_channels} {side} {side}")},
        outputs={"image": Axes(f"B 3 {size_px} {size_px}")},
    )
