"""The stages of the family `inl_diffusion`: their tensors and which weights may be narrow.

Free axes: B images, G rows of the transformer (B, or 2B with the null condition behind the
condition), N encoded prompts, S timesteps, y x a latent's grid of patches.

The text's keys and values are computed once per prompt, the modulation of all timesteps once per
schedule. `denoise` is one step of whichever sampler, with guidance in it. Norms, modulation, the
residual stream, the velocity of integrators, guidance and the sampler's sums stay float32.
"""

from collections.abc import Mapping

from nsp.diffusion.samplers import COLUMNS
from nsp.families.inl_diffusion.config import InlConfig
from nsp.family.contract import Span, Stage
from nsp.family.gate import Psnr
from nsp.stage.io import Axes, StageIO

_BLOCK, _CONTROL, _ANY = "dit.blocks.*", "dit.control.blocks.*", "dit.*blocks.*"
_PRODUCTS = ("attn.*_proj.*", "mlp.*", "cross_attn.q_proj.*", "cross_attn.out_proj.*")
_INTEGRATOR = ("halt_gate.*", "refine.*", "controller.*", "router.*", "shared_expert.*", "expert_*")
_MODULATION = (
    "dit.t_embed.*",
    "dit.pooled_embed.*",
    f"{_ANY}.adaLN_modulation.*",
    "dit.final_layer.adaLN_modulation.*",
)
_CONVOLUTIONS = ("conv*", "*.conv?.*", "*.conv.*", "*.skip.*", "*.qkv.*", "*.proj.*")


def _half(blocks: str) -> tuple[str, ...]:
    """Return the patterns of the narrow weights of these blocks and of what surrounds them."""
    return (
        *(f"{blocks}.{name}" for name in _PRODUCTS),
        *(f"{blocks}.integrator.{name}" for name in _INTEGRATOR),
        "dit.patch_embed.*",
        "dit.final_layer.linear.*",
    )


def _full(blocks: str) -> tuple[str, ...]:
    """Return the patterns of the other weights of these blocks."""
    of_integrators = ("mu", "integration_weight", "shared_weight")
    return (f"{blocks}.norm?.*", *(f"{blocks}.integrator.{name}" for name in of_integrators))


def stages(config: InlConfig, dtype: str) -> Mapping[str, Stage]:
    """Return every stage, in data-path order; `dtype` is that of keys and values."""
    found = {
        "text_encoder": _text_encoder(config),
        "condition": _condition(config, dtype),
        "modulation": _modulation(config),
        **({"control": _control(config, dtype)} if config.control_depth else {}),
        "denoise": _denoise(config, dtype),
    }
    return {
        **found,
        "blend": _blend(config),
        "decoder": _decoder(config),
        "encoder": _encoder(config),
    }


def _text_encoder(config: InlConfig) -> Stage:
    """Prompt tokens -> text states."""
    tokens = config.dit.context_length
    ids = {"token_ids": Axes(f"N {tokens}", "int64")}
    if config.text == "t5":
        ids["attention_mask"] = Axes(f"N {tokens}", "int64")
    io = StageIO(ids, {"text_states": _states(config)})
    return Stage(io=io, full=("text_encoder.*",))


def _states(config: InlConfig) -> Axes:
    return Axes(f"N {config.dit.num_states} {config.dit.context_width}")


def _text_keys(config: InlConfig, dtype: str, *, control: bool = False) -> dict[str, Axes]:
    """Return the text's keys and values in every block, or control block; rows first."""
    dit = config.dit
    shape = f"G {dit.num_heads} {dit.context_length} {dit.head_width}"
    numbers = [f"{i}" for i in range(dit.depth)]
    if control:
        numbers = [f"control_{i}" for i in range(config.control_depth)]
    names = (f"cross_{kind}_{number}" for number in numbers for kind in ("k", "v"))
    return {name: Axes(shape, dtype) for name in names}


def _condition(config: InlConfig, dtype: str) -> Stage:
    """Encoded prompts, and the one of every row -> its keys and values; row N is the null one."""
    inputs = {"text_states": _states(config), "prompts": Axes("G", "int64")}
    outputs = {**_text_keys(config, dtype), **_text_keys(config, dtype, control=True)}
    half = tuple(f"{_ANY}.cross_attn.{name}_proj.*" for name in ("k", "v"))
    return Stage(
        io=StageIO(inputs, outputs),
        half=half,
        full=(f"{_ANY}.norm_context.*", "dit.null_embedding"),
    )


def _modulation(config: InlConfig) -> Stage:
    """Timesteps -> the shifts, scales and gates of all blocks.

    Where they depend on the prompts, too, it is one timestep -> those of every row.
    """
    if config.dit.pooled_width:
        prompts = {"text_states": _states(config), "prompts": Axes("G", "int64")}
        io = StageIO({"timestep": Axes("1"), **prompts}, {"modulation": _modulations(config)})
        return Stage(io=io, full=(*_MODULATION, "dit.null_embedding"))
    io = StageIO({"timestep": Axes("S")}, {"modulation": Axes(f"S {config.num_modulations}")})
    return Stage(io=io, full=_MODULATION, spans=({"S": (1, config.noise.num_timesteps)},))


def _modulations(config: InlConfig) -> Axes:
    """Return the modulation of one step: the same for all rows, unless it depends on prompts."""
    return Axes(f"{'G' if config.dit.pooled_width else 1} {config.num_modulations}")


def _denoise(config: InlConfig, dtype: str) -> Stage:
    """One step: a noisy latent -> a less noisy one, and what the model takes the picture for."""
    latent = _latent(config)
    inputs = {
        **_position(config),
        "guidance": Axes("B"),  # 1: off
        "rescale": Axes("B"),
        "coefficients": Axes(f"B {len(COLUMNS)}"),
        "modulation": _modulations(config),
        "latent": latent,
        "x0_1": latent,  # the pictures that the two steps before predicted
        "x0_2": latent,
        "noise": latent,
        **_text_keys(config, dtype),
        **_added(config),
    }
    # The gate of the integrators, a mean over blocks and steps: how much each patch is refined.
    outputs = {"new_latent": latent, "x0": latent, "gate": Axes("B y x")}
    return Stage(
        io=StageIO(inputs, outputs),
        half=_half(_BLOCK),
        int8=tuple(f"{_BLOCK}.{name}" for name in ("attn.*_proj.*", "mlp.*")),
        full=(*_full(_BLOCK), "dit.final_layer.norm.*"),
        spans=_spans(config),
    )


def _control(config: InlConfig, dtype: str) -> Stage:
    """A noisy latent and a control picture's -> what is added behind the first blocks."""
    latent = _latent(config)
    inputs = {
        **_position(config),
        "coefficients": Axes(f"B {len(COLUMNS)}"),
        "modulation": _modulations(config),
        "latent": latent,
        "control": latent,
        **_text_keys(config, dtype, control=True),
    }
    return Stage(
        io=StageIO(inputs, _added(config)),
        half=(*_half(_CONTROL), "dit.control.patch_embed.*", "dit.control.outputs.*"),
        full=_full(_CONTROL),
        spans=_spans(config),
    )


def _position(config: InlConfig) -> dict[str, Axes]:
    """Return the rotations of the positions of each axis, and the image of every row.

    They come first, as the sizes of the other inputs follow from them.
    """
    quarter = config.dit.head_width // 4
    return {
        "row_turns": Axes(f"y {quarter} 2"),
        "column_turns": Axes(f"x {quarter} 2"),
        "rows": Axes("G", "int64"),
    }


def _added(config: InlConfig) -> dict[str, Axes]:
    """Return what the control adds behind each of the first blocks."""
    shape = Axes(f"G y x {config.dit.width}")
    return {f"added_{i}": shape for i in range(config.control_depth)}


def _spans(config: InlConfig) -> tuple[Span, ...]:
    """Return the grids of patches, one for each size of picture."""
    counts = [side // config.dit.patch_size for side in config.sides]
    return tuple({"y": count, "x": count} for count in counts)


def _cells(config: InlConfig) -> tuple[Span, ...]:
    """Return the grids of latents, one for each size of picture."""
    return tuple({"h": side, "w": side} for side in config.sides)


def _blend(config: InlConfig) -> Stage:
    """Keep a given picture outside of the mask, at the noise of the step that comes next."""
    latent = Axes(f"B {config.vae.latent_channels} h w")
    inputs = {
        "latent": latent,
        "kept": latent,
        "noise": latent,
        "mask": Axes("B 1 h w"),  # 1: drawn, 0: kept
        "level": Axes("B 2"),  # of the kept picture, and of noise
    }
    io = StageIO(inputs, {"new_latent": latent})
    return Stage(io=io, spans=_cells(config))


def _latent(config: InlConfig) -> Axes:
    """A latent, each side as patches and cells of one, so that every axis is free or fixed."""
    size = config.dit.patch_size
    return Axes(f"B {config.vae.latent_channels} y {size} x {size}")


def _decoder(config: InlConfig) -> Stage:
    """A latent -> pixels."""
    channels, pixels = config.vae.latent_channels, config.vae.downsampling
    io = StageIO(
        {"latent": Axes(f"B {channels} h w")},
        {"image": Axes(f"B 3 {pixels}*h {pixels}*w")},  # in [0, 1]
    )
    half, full = _vae_weights("decoder")
    return Stage(io=io, half=half, full=full, spans=_cells(config), gate=Psnr("image"))


def _encoder(config: InlConfig) -> Stage:
    """Pixels in [0, 1] -> the mean of their latent."""
    side = config.image_size_px
    io = StageIO(
        {"image": Axes(f"B 3 {side} {side}")},
        {
            "latent": Axes(
                f"B {config.vae.latent_channels} {config.latent_side} {config.latent_side}"
            )
        },
    )
    half, full = _vae_weights("encoder")
    return Stage(io=io, half=half, full=full)


def _vae_weights(part: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the patterns of the narrow and of the other weights of one half of the autoencoder."""
    half = tuple(f"vae.{part}.{pattern}" for pattern in _CONVOLUTIONS)
    return half, (f"vae.{part}.*norm*",)
