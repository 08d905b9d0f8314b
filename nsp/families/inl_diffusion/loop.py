"""The denoising loop of the family `inl_diffusion`: prompt and noise -> latent, step by step.

It does no arithmetic on tensors: every step is one run of `denoise`, whose numbers come from the
sampler's table. The work depends on the names and shapes of the inputs alone.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.errors import ConfigError
from nsp.families.inl_diffusion.config import InlConfig
from nsp.families.inl_diffusion.pictures import read_mask, read_picture
from nsp.families.inl_diffusion.sampling import InlSampling
from nsp.family.order import Encoded, Given, Order, Step, stacked, stream
from nsp.stage.arena import Array
from nsp.stage.backend import Backend
from nsp.stage.io import Shape

Orders = Sequence[Order[InlSampling]]
_STEP_NOISE = 1  # purpose of the random numbers that steps add; 0 is the first latent
_BASE = 10_000.0  # of rotations
INIT, MASK, CONTROL = "init_image", "mask_image", "control_image"
_ABOVE_ONE, _HALF = 1.0 + 1e-6, 0.5


def given(config: InlConfig) -> Mapping[str, Given]:
    """Return the arrays that an order may have: noise, and a picture to change, or a part of it.

    The picture is (3, H, W) in [0, 1]; the mask (H, W) is 1 where something new is drawn.
    """
    side = config.image_size_px
    return {
        "noise": Given(latent_shape(config), "float32", help="What the picture begins as."),
        INIT: Given(
            (3, side, side),
            "float32",
            least=0,
            below=_ABOVE_ONE,
            help="Picture to change, as much as --strength says.",
            read=read_picture,
        ),
        MASK: Given(
            (side, side),
            "float32",
            least=0,
            below=_ABOVE_ONE,
            help="White where --init-image is drawn again.",
            read=read_mask,
        ),
        CONTROL: Given(
            (3, side, side),
            "float32",
            least=0,
            below=_ABOVE_ONE,
            help="Picture that the new one follows, such as edges.",
            read=read_picture,
        ),
    }


def latent_shape(config: InlConfig, side: int | None = None) -> Shape:
    """Return the shape of one image's latent, of the usual side or of another."""
    side = side or config.latent_side
    return (config.vae.latent_channels, side, side)


def batch_key(config: InlConfig, order: Order[InlSampling]) -> Hashable:
    """Return the size, the steps and whether they are guided; guidance is a number per row."""
    sampling = order.sampling
    if order.condition is None and config.null_condition == "empty_prompt":
        raise ConfigError('this model has no learned null condition; give the prompt "" instead')
    if config.control_depth and CONTROL not in order.given:
        raise ConfigError(f"this model follows a control picture: give {CONTROL}")
    if CONTROL in order.given and not config.control_depth:
        raise ConfigError(f"this model has no control: omit {CONTROL}, or train one for it")
    if INIT not in order.given:
        if MASK in order.given:
            raise ConfigError(f"{MASK} says what of init_image to draw again; give that, too")
        if sampling.strength < 1:
            raise ConfigError(
                f"strength={sampling.strength:g} says how much of init_image to change; give that, "
                "or leave strength at 1"
            )
    side = sampling.side(config)
    if order.given and side != config.latent_side:
        raise ConfigError(
            f"{next(iter(order.given))} is for pictures of {config.image_size_px} px; omit size"
        )
    steps = sampling.table(config.noise)
    return (side, sampling.is_guided, tuple(steps.timesteps), steps.draws_noise)


def loop_inputs(config: InlConfig, orders: Orders, text: Encoded | None) -> dict[str, NDArray[Any]]:
    """Return all inputs of the loop from the host; names end with the number of their step."""
    batch, guided = len(orders), orders[0].sampling.is_guided
    tables = [order.sampling.table(config.noise) for order in orders]
    num_steps, side = len(tables[0].timesteps), orders[0].sampling.side(config)
    shape = latent_shape(config, side)
    images = np.arange(batch, dtype=np.int64)
    latent = stacked(orders, "noise", lambda o: stream(o.seed).standard_normal(shape, np.float32))
    scale = np.array([each.start_scale for each in tables], np.float32).reshape(-1, 1, 1, 1)
    turns = axis_turns(side // config.dit.patch_size, config.dit.head_width)
    guidance = np.array([order.sampling.guidance(num_steps) for order in orders], np.float32)
    inputs: dict[str, NDArray[Any]] = {
        **_prompt_inputs(config, orders, text),
        "latent": latent * scale,
        **_picture_inputs(config, orders, latent),
        "nothing": np.zeros_like(latent),
        "rows": np.tile(images, 2 if guided else 1),
        "rescale": np.array([o.sampling.guidance_rescale for o in orders], np.float32),
        "timestep": tables[0].timesteps,
        "row_turns": turns,
        "column_turns": turns,
    }
    noises = _step_noises(orders, num_steps, shape) if tables[0].draws_noise else None
    for step in range(num_steps):
        inputs[f"coefficients_{step}"] = np.stack([each.rows[step] for each in tables])
        inputs[f"guidance_{step}"] = guidance[:, step]
        if noises is not None:
            inputs[f"noise_{step}"] = noises[:, step]
    return inputs


def _prompt_inputs(config: InlConfig, orders: Orders, text: Encoded | None) -> dict[str, Any]:
    """Return the encoded prompts, and which of them every row has; row N is the learned null."""
    batch, guided = len(orders), orders[0].sampling.is_guided
    if text is None:
        shape = (batch, config.dit.num_states, config.dit.context_width)
        states = {"text_states": np.zeros(shape, np.float32)}
        null = np.full(batch, batch, np.int64)
    else:
        states, null = {"text_states": text.states["text_states"]}, text.null_rows()
    has_prompt = np.array([order.condition is not None for order in orders])
    learned = np.int64(len(states["text_states"]))
    rows = np.where(has_prompt, np.arange(batch, dtype=np.int64), learned)
    return {**states, "prompts": np.concatenate([rows, null]) if guided else rows}


def _picture_inputs(
    config: InlConfig, orders: Orders, noise: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """Return the pictures to change, if there are any, and where; noise levels are by step."""
    controls = {}
    if config.control_depth:
        controls[CONTROL] = np.stack([order.given[CONTROL] for order in orders])
    if INIT not in orders[0].given:
        return controls
    found = {**controls, INIT: np.stack([o.given[INIT] for o in orders]), "start_noise": noise}
    levels = np.stack([o.sampling.table(config.noise).levels for o in orders])
    shape = (len(orders), 1, config.latent_side, config.latent_side)
    found |= {"nowhere": np.zeros(shape, np.float32), "level_start": levels[:, 0]}
    if MASK in orders[0].given:
        pixels, side = config.vae.downsampling, config.latent_side
        masks = np.stack([order.given[MASK] for order in orders])
        cells = masks.reshape(-1, 1, side, pixels, side, pixels).max((3, 5))
        found[MASK] = (cells >= _HALF).astype(np.float32)
        for step in range(levels.shape[1] - 1):
            found[f"level_{step}"] = levels[:, step + 1]
    return found


def _step_noises(orders: Orders, num_steps: int, shape: Shape) -> NDArray[np.float32]:
    """Return the random numbers (B, S, C, h, w) that the steps add."""
    drawn = {
        order: stream(order.seed, _STEP_NOISE).standard_normal((num_steps, *shape), np.float32)
        for order in dict.fromkeys(orders)
    }
    return np.stack([drawn[order] for order in orders])


def axis_turns(count: int, head_width: int) -> NDArray[np.float32]:
    """Return (cos, sin) of the rotations of positions 0 to count - 1 of one axis, (count, K/4, 2).

    `nsp.layers.rotary.joined_turns` makes the table of a grid from those of its axes.
    """
    half = head_width // 2
    rates = np.float32(_BASE) ** (-np.arange(0, half, 2, dtype=np.float32)[: half // 2] / half)
    angles = np.arange(count, dtype=np.float32)[:, None] * rates.astype(np.float32)
    return np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)


def _modulation(
    backend: Backend, config: InlConfig, timestep_S: Array, prompts: Mapping[str, Array]
) -> Callable[[int], Array]:
    """Return a function that gives the modulation of a step.

    That of all steps is computed at once, unless it depends on the rows' prompts, too.
    """
    if config.dit.pooled_width:
        return lambda step: backend.run(
            "modulation", {"timestep": timestep_S[step : step + 1], **prompts}
        )["modulation"]
    whole = backend.run("modulation", {"timestep": timestep_S})["modulation"]
    return lambda step: whole[step : step + 1]


def denoise(backend: Backend, config: InlConfig, inputs: Mapping[str, Array]) -> Iterator[Step]:
    """Yield one Step per timestep; the pictures in between are what the model expects.

    The last one is the latent that the sampler ends with. Every step also has the mean gate (B, y,
    x) of all integrators, in [0, 1]: how much of its refinement each patch takes.
    """
    total = inputs["timestep"].shape[0]
    prompts = {name: inputs[name] for name in ("text_states", "prompts")}
    text = backend.run("condition", prompts)
    modulation = _modulation(backend, config, inputs["timestep"], prompts)
    nothing, kept = inputs["nothing"], dict[str, Array]()
    latent = inputs["latent"]
    if INIT in inputs:
        known = backend.run("encoder", {"image": inputs[INIT]})["latent"]
        kept = {"kept": known, "noise": inputs["start_noise"]}
        feeds = {"latent": nothing, "mask": inputs["nowhere"], "level": inputs["level_start"]}
        latent = backend.run("blend", {**feeds, **kept})["new_latent"]
    whole, size = latent.shape, config.dit.patch_size
    rows, columns = whole[2] // size, whole[3] // size
    cells = (*whole[:2], rows, size, columns, size)
    x0_1 = x0_2 = nothing.reshape(cells)
    control: dict[str, Array] = {}
    if CONTROL in inputs:
        known = backend.run("encoder", {"image": inputs[CONTROL]})["latent"]
        control = {n: each for n, each in text.items() if "control" in n}
        control["control"] = known.reshape(cells)
        text = {n: each for n, each in text.items() if "control" not in n}
    for step in range(total):
        shared = {
            **{name: inputs[name] for name in ("rows", "row_turns", "column_turns")},
            "coefficients": inputs[f"coefficients_{step}"],
            "modulation": modulation(step),
            "latent": latent.reshape(cells),
        }
        added = backend.run("control", {**shared, **control}) if control else {}
        feeds = {
            **shared,
            "x0_1": x0_1,
            "x0_2": x0_2,
            "noise": inputs.get(f"noise_{step}", nothing).reshape(cells),
            "guidance": inputs[f"guidance_{step}"],
            "rescale": inputs["rescale"],
            **text,
            **added,
        }
        made = backend.run("denoise", feeds)
        latent, x0_1, x0_2 = made["new_latent"].reshape(whole), made["x0"], x0_1
        if MASK in inputs:
            feeds = {"latent": latent, "mask": inputs[MASK], "level": inputs[f"level_{step}"]}
            latent = backend.run("blend", {**feeds, **kept})["new_latent"]
        shown = latent if step == total - 1 else made["x0"].reshape(whole)
        yield Step(step, total, "timestep", shown, {"gate": (made["gate"],)})
