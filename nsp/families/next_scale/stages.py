"""The stages of the family `next_scale`: their tensors and which weights may be narrow.

Free axes: B images, G rows of the base (B, or 2B with the null condition behind the condition), N
encoded prompts, h w a latent's grid. A predictor is a stage of its own with its side fixed, and so
is the number of tokens it finds cached.

An fp16 or bf16 export narrows convolutions and matrix products, and with them features, keys,
values and the attention between. What sums or steers stays float32: norms, the latent from scale to
scale, the Euler steps and guidance, the prompt's encoder and projection. The modules follow the
dtype of their weights (model.py, vae.py), so the patterns here are the whole precision map. The
decoder's activations fit float16 as its weights are divided beforehand (`vae.rescale_decoder`).
"""

from nsp.families.next_scale.config import NextScaleConfig
from nsp.family.contract import Stage
from nsp.family.gate import Psnr
from nsp.stage.io import Axes, StageIO

_DECODER = "vae.autoencoder.decoder"
_DECODER_HALF = (
    *("*.conv1.*", "*.conv2.*", "*.conv_shortcut.*", "*.upsamplers.*.conv.*"),
    *("*.attentions.*.to_*", ".conv_in.*", ".conv_out.*"),
)


def stages(config: NextScaleConfig, kv_layout: str, dtype: str) -> dict[str, Stage]:
    """Return every stage, in data-path order.

    `dtype` is that of keys and values, `kv_layout` always "delta".
    """
    assert kv_layout == "delta", kv_layout
    tokens, width = config.text.max_tokens, config.text.text_width
    condition = config.generator.condition_width
    channels, side = config.vae.latent_channels, config.latent_side
    latent = Axes(f"B {channels} {side} {side}")
    text_encoder = StageIO(
        inputs={"token_ids": Axes(f"N {tokens}", "int64")},
        outputs={"text_mean": Axes(f"N {width}")},
    )
    # Row N is the learned null condition.
    condition_io = StageIO(
        inputs={"text_mean": Axes(f"N {width}"), "rows": Axes("G", "int64")},
        outputs={"condition": Axes(f"G {condition}")},
    )
    predictors = {
        predictor_stage(k): Stage(
            io=_predictor(config, k, dtype), half=(f"generator.predictors.{k}.*",)
        )
        for k in range(config.num_predictors)
    }
    refine = StageIO(inputs={"latent": latent}, outputs={"new_latent": latent})
    return {
        "text_encoder": Stage(io=text_encoder, full=("text_encoder.*",)),
        "condition": Stage(io=condition_io, full=("generator.condition.*",)),
        "base": Stage(io=_base(config), half=("generator.base.*",)),
        **predictors,
        "refine": Stage(io=refine, half=("generator.refine.*",)),
        "decoder": _decoder(config),
    }


def _decoder(config: NextScaleConfig) -> Stage:
    """A latent of any scale, with an engine profile for each -> pixels."""
    channels, pixels = config.vae.latent_channels, config.vae.downsampling
    io = StageIO(
        inputs={"latent": Axes(f"B {channels} h w")},
        outputs={"image": Axes(f"B 3 {pixels}*h {pixels}*w")},  # in [0, 1]
    )
    return Stage(
        io=io,
        half=("vae.autoencoder.post_quant_conv.*", *(f"{_DECODER}{p}" for p in _DECODER_HALF)),
        full=(f"{_DECODER}.*norm*",),
        spans=tuple({"h": side, "w": side} for side in config.sides),
        gate=Psnr("image"),
    )


def predictor_stage(predictor: int) -> str:
    """Return the name of the stage that goes from latent k to latent k + 1."""
    return f"predictor_{predictor}"


def _base(config: NextScaleConfig) -> StageIO:
    """Noise, or a latent on its way from it -> the latent one Euler step further.

    A regression base makes one step, from noise to the latent.
    """
    side = config.initial_size
    latent = Axes(f"B {config.vae.latent_channels} {side} {side}")
    inputs = {
        "latent": latent,
        "condition": Axes(f"G {config.generator.condition_width}"),
        "rows": Axes("G", "int64"),  # the image of every row
        "guidance": Axes("B"),  # 1: off
    }
    if config.generator.base == "flow":
        inputs |= {"time": Axes(""), "step_size": Axes("")}
    return StageIO(inputs=inputs, outputs={"new_latent": latent})


def _predictor(config: NextScaleConfig, predictor: int, dtype: str) -> StageIO:
    """A latent, the condition and the cache -> the next latent and what the cache grows by."""
    generator, channels = config.generator, config.vae.latent_channels
    side, following = config.sides[predictor : predictor + 2]
    heads = f"{generator.num_kv_groups} {generator.head_width}"
    cache = [f"{kind}_{i}" for i in range(generator.num_blocks) for kind in ("k", "v")]
    inputs = {
        "latent": Axes(f"B {channels} {side} {side}"),
        "condition": Axes(f"B {generator.condition_width}"),
    }
    outputs = {"new_latent": Axes(f"B {channels} {following} {following}")}
    # Runtimes may not accept tensors without elements, so the first predictor has no past.
    if past := config.past_tokens(predictor):
        inputs |= {f"past_{name}": Axes(f"{past} B {heads}", dtype) for name in cache}
    if config.has_keys(predictor):
        outputs |= {f"new_{name}": Axes(f"{side**2} B {heads}", dtype) for name in cache}
    return StageIO(inputs=inputs, outputs=outputs)
