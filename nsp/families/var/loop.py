"""The scale loop of the family `var`: prompt -> condition -> scale steps -> latent, on any backend.

It does no arithmetic on tensors: it hands over views and advances counters. It is a generator and
yields after every scale step, so the caller owns progress, previews and early stop.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.errors import ConfigError
from nsp.families.var.config import VarConfig
from nsp.families.var.sampling import VarSampling, draw_gumbel, scale_ratios
from nsp.family.code_sampling import draw_inputs, draw_uniforms
from nsp.family.order import Encoded, Given, Order, Step, stacked
from nsp.layers.resample import area_matrix, bicubic_matrix
from nsp.stage.arena import Array, KVShape
from nsp.stage.backend import Backend

# Inputs of stages that differ at every scale.
_SELECT = ("uniforms", "forced", "guidance")
_SMOOTH = ("gumbel", "ratio")
_SETTINGS = ("temperature", "top_p", "top_k")
_RESIZE = ("up_rows", "up_cols", "down_rows", "down_cols", "phi")
_TEXT = ("text_states", "text_pooled")

Orders = Sequence[Order[VarSampling]]


def given(config: VarConfig) -> Mapping[str, Given]:
    """Return the arrays an order may have: random numbers and tokens of all scales, in order."""
    length, codes = config.num_tokens, config.vae.vocab_size
    return {
        "uniforms": Given(
            (length,), "float32", least=0, below=1, help="Numbers in [0, 1) to draw codes with."
        ),
        "forced_tokens": Given(
            (length,), "int64", least=-1, below=codes, help="Codes to keep; -1 is drawn."
        ),
        "gumbel": Given((length, codes), "float32", help="Noise for --more-smooth."),
    }


def batch_key(config: VarConfig, order: Order[VarSampling]) -> Hashable:
    """Return the guided scales, the way codes are drawn, and the number of sorted logits."""
    sampling = order.sampling
    if "gumbel" in order.given and not sampling.more_smooth:
        raise ConfigError("gumbel has no effect without more_smooth=True; omit it or set that")
    ranks = sampling.num_ranks(config.vae.vocab_size)
    return (_guided_scales(config, order), sampling.more_smooth, ranks)


def _guided_scales(config: VarConfig, order: Order[VarSampling]) -> int:
    """Return how many scales have null rows: those up to the last one that is guided."""
    guidance = order.sampling.guidance_per_scale(config.num_scales)
    return max((s + 1 for s, value in enumerate(guidance) if value != 1), default=0)


def loop_inputs(config: VarConfig, orders: Orders, text: Encoded | None) -> dict[str, NDArray[Any]]:
    """Return all inputs of the loop from the host; names of inputs for scale s end in `_s`."""
    batch, side, first = len(orders), config.latent_side, orders[0]
    smooth, guided_scales = first.sampling.more_smooth, _guided_scales(config, first)
    inputs = {
        **_condition_inputs(config, orders, text, guided=guided_scales > 0),
        "latent": np.zeros((batch, config.vae.latent_channels, side, side), np.float32),
        **draw_inputs(orders, config.vae.vocab_size),
    }
    length, codes = config.num_tokens, config.vae.vocab_size
    free = np.full(length, -1, np.int64)
    by_scale = {
        "uniforms": stacked(orders, "uniforms", lambda o: draw_uniforms(o.seed, length)),
        "forced": stacked(orders, "forced_tokens", lambda o: free),
    }
    if smooth:
        by_scale["gumbel"] = stacked(orders, "gumbel", lambda o: draw_gumbel(o.seed, length, codes))
    guidance = np.array([o.sampling.guidance_per_scale(config.num_scales) for o in orders])
    ratios, phis = scale_ratios(config.num_scales), config.vae.phi_indices(config.num_scales)
    images, stop = np.arange(batch, dtype=np.int64), 0
    for scale, grid in enumerate(config.patch_nums):
        start, stop = stop, stop + grid**2
        following = min(scale + 1, config.num_scales - 1)  # nothing follows the last one
        here: dict[str, NDArray[Any]] = {
            **{n: np.ascontiguousarray(a[:, start:stop]) for n, a in by_scale.items()},
            "positions": np.arange(start, stop),
            "guidance": guidance[:, scale].astype(np.float32),
            "phi": np.array(phis[scale], np.int64),
            "next_rows": np.tile(images, 2 if following < guided_scales else 1),
            **_resize_inputs(config, scale),
        }
        if smooth:
            here["ratio"] = np.array(ratios[scale], np.float32)
        inputs |= {f"{name}_{scale}": array for name, array in here.items()}
    return inputs


def _condition_inputs(
    config: VarConfig, orders: Orders, text: Encoded | None, *, guided: bool
) -> dict[str, NDArray[Any]]:
    """Return class ids (G,), or the encoded prompts and the one of every row; null rows are last.

    Row N is the learned null condition, inside the stage. `rows_alone` are the rows without null
    rows.
    """
    if text is None:
        ids = np.array([order.condition for order in orders], np.int64)
        null = np.full_like(ids, config.num_classes)
        return {"rows": np.concatenate([ids, null]) if guided else ids, "rows_alone": ids}
    alone = np.arange(len(orders), dtype=np.int64)
    rows = np.concatenate([alone, text.null_rows()]) if guided else alone
    return {**text.states, "rows": rows, "rows_alone": alone}


def _resize_inputs(config: VarConfig, scale: int) -> dict[str, NDArray[np.float32]]:
    """Return the resizing matrices of one scale.

    The last scale has no next grid and gets the first one's.
    """
    sides = config.patch_nums
    up = bicubic_matrix(sides[scale], sides[-1])
    down = area_matrix(sides[-1], sides[(scale + 1) % len(sides)])
    return {"up_rows": up, "up_cols": up, "down_rows": down, "down_cols": down}


def generate(backend: Backend, config: VarConfig, inputs: Mapping[str, Array]) -> Iterator[Step]:
    """Yield one Step per scale of `loop_inputs`; the last latent is the decoder's input."""
    batch, rows = inputs["uniforms_0"].shape[0], inputs["rows"].shape[0]
    encoded = {name: inputs[name] for name in _TEXT if name in inputs}
    conditioning = _condition(backend, encoded, inputs["rows"])
    x, latent = conditioning.pop("x"), inputs["latent"]
    with backend.arena(cache(config, rows, backend.kv_dtype())) as arena:
        for scale, grid in enumerate(config.patch_nums):
            here = _of_scale(inputs, scale)
            if x.shape[0] < arena.shape.rows:  # guidance has ended
                conditioning = _condition(backend, encoded, inputs["rows_alone"])
                del conditioning["x"]
                arena.keep_rows(batch)
            stepped = backend.run(
                "step",
                {"x": x, "positions": here["positions"], **conditioning, **arena.past()},
                arena.new(grid**2),
            )
            arena.advance(grid**2)
            selected = _select(backend, inputs, here, stepped["logits"])
            drawn = {"tokens": (selected["tokens"],), "logits": (selected["guided"],)}
            codes = selected["codes"].reshape((batch, grid, grid, config.vae.latent_channels))
            added = {"codes": codes, "latent": latent, "rows": here["next_rows"]}
            resize = {name: here[name] for name in _RESIZE}
            grown = backend.run("accumulate", {**added, **resize})
            latent, x = grown["new_latent"], grown["x"]
            yield Step(scale, config.num_scales, "scale", latent, drawn)


def _condition(backend: Backend, encoded: Mapping[str, Array], rows: Array) -> dict[str, Array]:
    """Return the outputs of `condition` for rows (G,): numbers of encoded prompts, or classes."""
    if not encoded:
        return dict(backend.run("condition", {"class_ids": rows}))
    return dict(backend.run("condition", {**encoded, "rows": rows}))


def _of_scale(inputs: Mapping[str, Array], scale: int) -> dict[str, Array]:
    """Return the inputs for one scale, with names without its number."""
    end = f"_{scale}"
    return {n.removesuffix(end): array for n, array in inputs.items() if n.endswith(end)}


def _select(
    backend: Backend, inputs: Mapping[str, Array], here: Mapping[str, Array], logits: Array
) -> dict[str, Array]:
    """Run the selection stage of one scale: the smooth one if its noise is given.

    If the backend cannot sort as many codes as top-p without top-k needs, a stage that does not
    sort them is used.
    """
    stage = "select_smooth" if "gumbel" in here else "select"
    own = (*_SELECT, *(_SMOOTH if stage == "select_smooth" else ()))
    ranks, most = inputs["ranks"], backend.max_ranks
    if most is not None and ranks.shape[0] > most:
        stage, ranks = f"{stage}_nucleus", inputs.get("top_k_ranks", ranks)
    settings = {name: inputs[name] for name in _SETTINGS}
    feeds = {"logits": logits, "ranks": ranks, **{n: here[n] for n in own}, **settings}
    return backend.run(stage, feeds)


def cache(config: VarConfig, rows: int, dtype: str) -> KVShape:
    """Return the size of the cache for all scales."""
    predictor = config.predictor
    return KVShape(
        num_layers=predictor.depth,
        num_tokens=config.num_tokens,
        rows=rows,
        num_heads=predictor.num_heads,
        head_width=predictor.head_width,
        dtype=dtype,
    )
