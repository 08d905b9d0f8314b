"""The stages of the family `var`: their tensors, which weights may be narrow, and their sizes.

Free axes: B images, G transformer rows (B, or 2B with the null condition behind the condition), N
encoded prompts, L tokens of this scale, P cached tokens, R logits that are sorted for top-k and
top-p, p q this scale's grid, r c the next scale's grid. Fixed numbers in the declarations come from
the configuration: width, heads, blocks, codes, latent channels.

An fp16 or bf16 export narrows matrix products and convolutions, and with them keys, values and the
attention between. What sums many numbers or decides tokens stays float32: norms, q/k normalisation,
the residual stream, AdaLN results, logits, guidance and sampling, codebook, phi convolutions and
f_hat, embeddings and positions, the prompt's encoder and pooling. The modules follow the dtype of
their weights (model.py), so the patterns here are the whole precision map.
"""

from nsp.families.var.config import TextCondition, VarConfig
from nsp.family.contract import Span, Stage
from nsp.family.gate import Psnr, Tokens
from nsp.stage.backend import TENSORRT_RANKS
from nsp.stage.io import Axes, StageIO

_BLOCK = "predictor.blocks.*"
_CODEBOOK = "vae.quantize.embedding.*"
SELECT_STAGES = ("select", "select_smooth", "select_nucleus", "select_smooth_nucleus")


def needs_nucleus_stages(config: VarConfig, kv_layout: str) -> bool:
    """Return whether there are stages that draw by top-p alone without sorting all codes.

    Only TensorRT, which uses this layout, cannot sort so many.
    """
    return kv_layout == "delta" and config.vae.vocab_size > TENSORRT_RANKS


def stages(config: VarConfig, kv_layout: str, dtype: str) -> dict[str, Stage]:
    """Return every stage, in data-path order; `dtype` is that of keys and values."""
    scales, codes = _scale_sizes(config), config.vae.vocab_size
    lengths = (config.patch_nums[0] ** 2, config.patch_nums[-1] ** 2)

    def select(*, smooth: bool, spans: tuple[Span, ...] = scales) -> Stage:
        io = _select(config, smooth=smooth)
        return Stage(io=io, full=(_CODEBOOK,), spans=spans, max_ranks=codes)

    found = {
        "condition": _condition(config, dtype),
        "step": _step(config, kv_layout, dtype, scales),
        "select": select(smooth=False),
        "select_smooth": select(smooth=True),
    }
    if needs_nucleus_stages(config, kv_layout):  # one profile needs as much memory as ten others
        whole: tuple[Span, ...] = ({"L": lengths},)
        found["select_nucleus"] = select(smooth=False, spans=whole)
        found["select_smooth_nucleus"] = select(smooth=True, spans=whole)
    found |= {"accumulate": _accumulate(config, scales), "decoder": _decoder(config)}
    return found if config.text is None else {"text_encoder": _text_encoder(config.text), **found}


def _scale_sizes(config: VarConfig) -> tuple[Span, ...]:
    """Return tokens, past and grids of every scale; the first grid follows the last (loop.py)."""
    sides, sizes, past = config.patch_nums, [], 0
    for side, following in zip(sides, [*sides[1:], sides[0]], strict=True):
        grids = {"p": side, "q": side, "r": following, "c": following}
        sizes.append({"L": side**2, "P": past, **grids})
        past += side**2
    return tuple(sizes)


def _text_encoder(text: TextCondition) -> Stage:
    tokens, width = text.max_tokens, text.text_width
    io = StageIO(
        inputs={"token_ids": Axes(f"N {tokens}", "int64")},
        outputs={"text_states": Axes(f"N {tokens} {width}"), "text_pooled": Axes(f"N {width}")},
    )
    return Stage(io=io, full=("text_encoder.*",))


def _conditioning(config: VarConfig, dtype: str) -> dict[str, Axes]:
    """Return the outputs of `condition` for every `step`."""
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


def _condition(config: VarConfig, dtype: str) -> Stage:
    """Class ids, or rows of encoded prompts -> all that is computed once per image.

    Row N is the null condition if that is learned.
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
    half, full = ["predictor.head_nm.ada_lin.*"], ["predictor.pos_start"]
    if config.predictor.shared_aln:
        half.append("predictor.shared_ada_lin.*")
        full.append(f"{_BLOCK}.ada_gss")
    else:
        half.append(f"{_BLOCK}.ada_lin.*")
    if config.text is None:
        full.append("predictor.class_emb.*")
    else:
        half.append(f"{_BLOCK}.cross.kv.*")
        full += ["predictor.text_pool.*", "predictor.text_null_*"]
    io = StageIO(inputs=inputs, outputs={"x": start, **_conditioning(config, dtype)})
    return Stage(io=io, half=tuple(half), full=tuple(full))


def _step(config: VarConfig, kv_layout: str, dtype: str, scales: tuple[Span, ...]) -> Stage:
    """Tokens of one scale and the cache -> logits and new keys and values.

    New ones are only the new part of the cache (layout "delta") or the whole cache ("present").
    """
    predictor = config.predictor
    heads, head_width = predictor.num_heads, predictor.head_width
    delta = kv_layout == "delta"
    past = f"P G {heads} {head_width}" if delta else f"G {heads} P {head_width}"
    new = f"L G {heads} {head_width}" if delta else f"G {heads} P+L {head_width}"
    cache = [f"{kind}_{i}" for i in range(predictor.depth) for kind in ("k", "v")]
    io = StageIO(
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
    half = [f"{_BLOCK}.attn.mat_qkv.*", f"{_BLOCK}.attn.proj.*", f"{_BLOCK}.ffn.*"]
    half.append("predictor.head.*")
    full = [f"{_BLOCK}.attn.[qv]_bias", f"{_BLOCK}.attn.scale_mul_1H11"]
    full += ["predictor.pos_1LC", "predictor.lvl_embed.*"]
    if config.text is not None:
        half += [f"{_BLOCK}.cross.q.*", f"{_BLOCK}.cross.proj.*"]
        full.append(f"{_BLOCK}.cross.scale_mul_1H11")
    # Nearly all of an image's products are in this stage; the others stay as they are in int8.
    return Stage(
        io=io,
        half=tuple(half),
        int8=tuple(half),
        full=tuple(full),
        spans=scales,
        gate=Tokens("logits", drawn_by=SELECT_STAGES),
    )


def _select(config: VarConfig, *, smooth: bool) -> StageIO:
    """Logits and one uniform number per token -> tokens and their code vectors.

    `forced` has a token to use instead of the sampled one, or -1; `tokens` are the sampled ones.
    Every image has its own settings. `ranks` counts from 0 to the number of logits to sort.
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


def _accumulate(config: VarConfig, scales: tuple[Span, ...]) -> Stage:
    """Code vectors of one scale and the running latent -> new latent, next scale's input tokens."""
    channels, side = config.vae.latent_channels, config.latent_side
    latent = Axes(f"B {channels} {side} {side}")
    io = StageIO(
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
    full = ("predictor.word_embed.*", "vae.quantize.quant_resi.*")
    return Stage(io=io, full=full, spans=scales)


def _decoder(config: VarConfig) -> Stage:
    """The finished latent -> pixels in [0, 1]."""
    side, size_px = config.latent_side, config.image_size_px
    io = StageIO(
        inputs={"latent": Axes(f"B {config.vae.latent_channels} {side} {side}")},
        outputs={"image": Axes(f"B 3 {size_px} {size_px}")},
    )
    convolutions = ("conv*", "nin_shortcut.*", "qkv.*", "proj_out.*")
    half = tuple(f"vae.decoder.*{name}" for name in convolutions)
    return Stage(
        io=io,
        half=("vae.post_quant_conv.*", *half),
        full=("vae.decoder.*norm*",),
        gate=Psnr("image"),
    )
