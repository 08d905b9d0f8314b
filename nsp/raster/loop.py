"""The raster loop: one code after the other, on any backend; without torch.

It does no arithmetic on tensors: it hands over views and counts. It is a generator and yields after
every row of codes, so the caller owns progress, previews and early stop.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nsp.family.code_sampling import draw_inputs, draw_uniforms
from nsp.family.order import Encoded, Given, Order, Step, stacked
from nsp.raster.grid import RasterGrid
from nsp.raster.sampling import RasterSampling
from nsp.raster.stages import SETTINGS
from nsp.stage.arena import Array
from nsp.stage.backend import Backend

Orders: TypeAlias = Sequence[Order[RasterSampling]]


def given(grid: RasterGrid) -> Mapping[str, Given]:
    """Return the arrays that an order may have: random numbers and codes, in raster order."""
    length, codes = grid.length, grid.num_codes
    return {
        "uniforms": Given(
            (length,), "float32", least=0, below=1, help="Numbers in [0, 1) to draw codes with."
        ),
        "forced_tokens": Given(
            (length,), "int64", least=-1, below=codes, help="Codes to keep; -1 is drawn."
        ),
    }


def batch_key(grid: RasterGrid, order: Order[RasterSampling]) -> Hashable:
    """Return the number of guided codes and of sorted logits.

    Raises ConfigError for an interval outside the sequence, also where nothing is guided.
    """
    order.sampling.num_guided(grid.length)
    sampling = _guided_if_possible(order).sampling
    return sampling.num_guided(grid.length), sampling.num_ranks(grid.num_codes)


def _guided_if_possible(order: Order[RasterSampling]) -> Order[RasterSampling]:
    """Return the order without guidance if both of its branches would be the same."""
    if order.condition is not None or order.negative is not None:
        return order
    unguided = replace(order.sampling, guidance_scale=1.0, cfg_interval=-1)
    return replace(order, sampling=unguided)


def loop_inputs(grid: RasterGrid, orders: Orders) -> dict[str, NDArray[Any]]:
    """Return all inputs of the loop from the host but the family's own; N codes come first.

    `guidance` (n, B) is of the guided codes only, so its shape says when guidance ends.
    """
    orders = [_guided_if_possible(order) for order in orders]
    batch, length = len(orders), grid.length
    num_guided = orders[0].sampling.num_guided(length)
    free = np.full(length, -1, np.int64)
    uniforms = stacked(orders, "uniforms", lambda o: draw_uniforms(o.seed, length))
    forced = stacked(orders, "forced_tokens", lambda o: free)
    scales = np.array([o.sampling.guidance_scale for o in orders], np.float32)
    return {
        "index": np.arange(length),
        "uniforms": np.ascontiguousarray(uniforms.T)[..., None],
        "forced": np.ascontiguousarray(forced.T)[..., None],
        "guidance": np.tile(scales, (num_guided, 1)),
        "unguided": np.ones(batch, np.float32),
        "codes": np.full((batch, length), -1, np.int64),
        "rows": np.tile(np.arange(batch), 2 if num_guided else 1),
        **draw_inputs(orders, grid.num_codes),
    }


def prompt_inputs(
    orders: Orders, text: Encoded | None, *, num_rows: int, num_tokens: int, width: int
) -> dict[str, NDArray[Any]]:
    """Return encoded prompts `text_states` (N, T, width), and `prompts` (G,), the one of each row.

    Prompt N is the stored null condition. Orders without a prompt have it, so that they need no
    text encoder.
    """
    batch = len(orders)
    if text is None:
        states = np.zeros((batch, num_tokens, width), np.float32)
        found, null = {"text_states": states}, np.full(batch, batch)
    else:
        found, null = dict(text.states), text.null_rows()
    has_prompt = np.array([order.condition is not None for order in orders])
    prompts = np.where(has_prompt, np.arange(batch), len(found["text_states"]))
    return {**found, "prompts": np.concatenate([prompts, null])[:num_rows]}


def draw_codes(
    backend: Backend,
    grid: RasterGrid,
    inputs: Mapping[str, Array],
    *,
    carried: Mapping[str, Array],
    prefix: Mapping[str, Array] | None = None,
) -> Iterator[Step]:
    """Yield one Step per row of codes; the last latent is the decoder's input.

    The first code follows from `inputs["token"]`, one per transformer row, or from a `prefix`, the
    own inputs of stage `prefill`. `carried` are further inputs of `decode`, with rows first.
    """
    batch, num_guided = inputs["codes"].shape[0], inputs["guidance"].shape[0]
    codes, rows, token = inputs["codes"], inputs["rows"], inputs.get("token")
    with backend.arena(grid.cache(rows.shape[0], backend.kv_dtype())) as arena:
        for first in range(0, grid.length, grid.side):
            tokens, logits = [], []
            for index in range(first, first + grid.side):
                if index >= num_guided and rows.shape[0] > batch:  # guidance has ended
                    rows, token = rows[:batch], None if token is None else token[:batch]
                    carried = {name: array[:batch] for name, array in carried.items()}
                    arena.keep_rows(batch)
                draw = {**_of_code(inputs, index), "codes": codes, "rows": rows}
                stage, count, own = "decode", 1, {**carried, **arena.past()}
                if token is None:
                    assert prefix is not None
                    stage, count, own = "prefill", grid.num_prefix, dict(prefix)
                else:
                    own["token"] = token
                made = _draw(backend, stage, own, draw, inputs, arena.new(count))
                arena.advance(count)
                token, codes = made["next"], made["new_codes"]
                tokens.append(made["tokens"])
                logits.append(made["guided"])
            drawn = {"tokens": tuple(tokens), "logits": tuple(logits)}
            latent = codes.reshape((batch, grid.side, grid.side))
            yield Step(first // grid.side, grid.side, "row", latent, drawn)


def _of_code(inputs: Mapping[str, Array], index: int) -> dict[str, Array]:
    """Return what differs from code to code, as views."""
    here, batch = slice(index, index + 1), inputs["codes"].shape[0]
    guided = index < inputs["guidance"].shape[0]
    return {
        "index": inputs["index"][here],
        "uniforms": inputs["uniforms"][here].reshape((batch, 1)),
        "forced": inputs["forced"][here].reshape((batch, 1)),
        "guidance": inputs["guidance"][here].reshape((batch,)) if guided else inputs["unguided"],
    }


def _draw(
    backend: Backend,
    stage: str,
    own: Mapping[str, Array],
    draw: Mapping[str, Array],
    inputs: Mapping[str, Array],
    new: Mapping[str, Array],
) -> dict[str, Array]:
    """Run a stage that draws a code; it is drawn again if the backend cannot sort all codes."""
    settings, ranks = {name: inputs[name] for name in SETTINGS}, inputs["ranks"]
    most = backend.max_ranks
    if most is None or ranks.shape[0] <= most:
        return backend.run(stage, {**own, **draw, **settings, "ranks": ranks}, new)
    ranks = inputs["top_k_ranks"]
    unfiltered = {**settings, "top_p": inputs["unguided"]}  # ones: off
    made = backend.run(stage, {**own, **draw, **unfiltered, "ranks": ranks}, new)
    feeds = {"logits": made["logits"], **draw, **settings, "ranks": ranks}
    return {**made, **backend.run("nucleus", feeds)}
