"""The scale loop of the family `var`: prompt -> condition -> scale steps -> latent, on any backend.

It does no arithmetic on tensors: it hands over views and advances counters. It is a generator and
yields after every scale step, so the caller owns progress, previews and early stop.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.errors import ConfigError
from nsp.families.var.config import VarConfig
from nsp.family.sampling import SamplingConfig, rank_bucket, scale_ratios
from nsp.layers.resample import area_matrix, bicubic_matrix
from nsp.stage.arena import Array, KVShape
from nsp.stage.backend import Backend

# What is different at every scale and goes to its stages.
_SELECT = ("uniforms", "forced", "guidance")
_SMOOTH = ("gumbel", "ratio")
_SETTINGS = ("temperature", "top_p", "top_k")
_RESIZE = ("up_rows", "up_cols", "down_rows", "down_cols", "phi")


@dataclass(frozen=True)
class Request:
    """One batch of B images to generate. Exactly one of `class_ids` and `token_ids` is given."""

    sampling: SamplingConfig
    uniforms: NDArray[np.float32]  # (B, L of all scales)
    class_ids: NDArray[np.int64] | None = None  # (B,)
    token_ids: NDArray[np.int64] | None = None  # (B, T) prompts from the model's own tokenizer
    null_token_ids: NDArray[np.int64] | None = None  # (1, T) the prompt ""
    forced_tokens: NDArray[np.int64] | None = None  # (B, L of all scales); -1: sample
    gumbel: NDArray[np.float32] | None = None  # (B, L of all scales, V), for more_smooth

    @property
    def batch(self) -> int:
        """B, the number of images."""
        return int(self.uniforms.shape[0])


@dataclass(frozen=True)
class ScaleStep:
    """What is known after one scale step; arrays are the backend's."""

    scale: int
    num_scales: int
    tokens: Array  # (B, L) sampled
    guided: Array  # (B, L, V) guided logits, before temperature and filters
    latent: Array  # (B, C, h, w) f_hat so far


def loop_inputs(config: VarConfig, request: Request) -> dict[str, NDArray[Any]]:
    """Return all that the loop takes from the host; what is for scale s is named `..._s`.

    What the loop does follows from the names and shapes alone, so it can be recorded.
    """
    sampling, batch = request.sampling, request.batch
    guidance = sampling.guidance_per_scale(config.num_scales)
    # Rows of the null condition are left out once nothing is guided any more.
    guided_scales = max((s + 1 for s, value in enumerate(guidance) if value != 1), default=0)
    side = config.latent_side
    inputs = {
        **_condition_inputs(config, request, guided=guided_scales > 0),
        "latent": np.zeros((batch, config.vae.latent_channels, side, side), np.float32),
        "temperature": np.full(batch, sampling.temperature, np.float32),
        "top_p": np.full(batch, sampling.top_p, np.float32),
        **_top_k_inputs(sampling, batch, config.vae.vocab_size),
    }
    forced = request.forced_tokens
    if forced is None:
        forced = np.full(request.uniforms.shape, -1, np.int64)
    ratios, phis = scale_ratios(config.num_scales), config.vae.phi_indices(config.num_scales)
    images, stop = np.arange(batch, dtype=np.int64), 0
    for scale, grid in enumerate(config.patch_nums):
        start, stop = stop, stop + grid**2
        following = min(scale + 1, config.num_scales - 1)  # nothing follows the last one
        here: dict[str, NDArray[Any]] = {
            "positions": np.arange(start, stop),
            "uniforms": np.ascontiguousarray(request.uniforms[:, start:stop]),
            "forced": np.ascontiguousarray(forced[:, start:stop]),
            "guidance": np.full(batch, guidance[scale], np.float32),
            "phi": np.array(phis[scale], np.int64),
            "next_rows": np.tile(images, 2 if following < guided_scales else 1),
            **_resize_inputs(config, scale),
        }
        if sampling.more_smooth:
            assert request.gumbel is not None
            here["gumbel"] = np.ascontiguousarray(request.gumbel[:, start:stop])
            here["ratio"] = np.array(ratios[scale], np.float32)
        inputs |= {f"{name}_{scale}": array for name, array in here.items()}
    return inputs


def _top_k_inputs(
    sampling: SamplingConfig, batch: int, vocab_size: int
) -> dict[str, NDArray[np.int64]]:
    """Return every image's top-k, and the ranks to sort; 0 is off.

    Where top-p alone takes all codes for ranks, `top_k_ranks` are those of a stage that does
    without.
    """
    top_k = min(sampling.top_k, vocab_size)
    ranks = {"ranks": sampling.num_ranks(vocab_size)}
    if sampling.is_nucleus_alone:
        ranks["top_k_ranks"] = rank_bucket(top_k, vocab_size)
    return {
        "top_k": np.full(batch, top_k, np.int64),
        **{name: np.arange(count, dtype=np.int64) for name, count in ranks.items()},
    }


def _condition_inputs(
    config: VarConfig, request: Request, *, guided: bool
) -> dict[str, NDArray[Any]]:
    """Return class ids (G,), or distinct prompts and the prompt of every row; null rows are last.

    Row N is the null condition: a learned one inside the stage, else "" encoded as the last prompt.
    `rows_alone` are the rows without null rows.
    """
    if config.text is None:
        ids = request.class_ids
        assert ids is not None
        null = np.full_like(ids, config.num_classes)
        return {"rows": np.concatenate([ids, null]) if guided else ids, "rows_alone": ids}
    assert request.token_ids is not None
    prompts, alone = np.unique(request.token_ids, axis=0, return_inverse=True)
    rows = alone = alone.reshape(-1).astype(np.int64)
    if guided:
        rows = np.concatenate([alone, np.full(request.batch, len(prompts), np.int64)])
        if config.text.null == "empty_prompt":
            assert request.null_token_ids is not None
            prompts = np.concatenate([prompts, request.null_token_ids])
    return {"token_ids": prompts, "rows": rows, "rows_alone": alone}


def _resize_inputs(config: VarConfig, scale: int) -> dict[str, NDArray[np.float32]]:
    """Return the resizing matrices of one scale.

    The last scale has no next grid and gets the first one's.
    """
    sides = config.patch_nums
    up = bicubic_matrix(sides[scale], sides[-1])
    down = area_matrix(sides[-1], sides[(scale + 1) % len(sides)])
    return {"up_rows": up, "up_cols": up, "down_rows": down, "down_cols": down}


def generate(
    backend: Backend, config: VarConfig, inputs: Mapping[str, Array]
) -> Iterator[ScaleStep]:
    """Yield one ScaleStep per scale of `loop_inputs`; the last latent is the decoder's input."""
    batch, rows = inputs["uniforms_0"].shape[0], inputs["rows"].shape[0]
    encoded = _encoded(backend, inputs)
    conditioning = _condition(backend, encoded, inputs["rows"])
    x, latent = conditioning.pop("x"), inputs["latent"]
    with backend.arena(_kv_shape(backend, config, rows)) as arena:
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
            tokens, guided = selected["tokens"], selected["guided"]
            codes = selected["codes"].reshape((batch, grid, grid, config.vae.latent_channels))
            added = {"codes": codes, "latent": latent, "rows": here["next_rows"]}
            resize = {name: here[name] for name in _RESIZE}
            grown = backend.run("accumulate", {**added, **resize})
            latent, x = grown["new_latent"], grown["x"]
            yield ScaleStep(scale, config.num_scales, tokens, guided, latent)


def _encoded(backend: Backend, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the encoded prompts; nothing for a class-conditional model."""
    if "token_ids" not in inputs:
        return {}
    return backend.run("text_encoder", {"token_ids": inputs["token_ids"]})


def _condition(backend: Backend, encoded: Mapping[str, Array], rows: Array) -> dict[str, Array]:
    """Return the outputs of `condition` for rows (G,): numbers of encoded prompts, or classes."""
    if not encoded:
        return dict(backend.run("condition", {"class_ids": rows}))
    return dict(backend.run("condition", {**encoded, "rows": rows}))


def _of_scale(inputs: Mapping[str, Array], scale: int) -> dict[str, Array]:
    """Return what is for one scale, without its number."""
    end = f"_{scale}"
    return {n.removesuffix(end): array for n, array in inputs.items() if n.endswith(end)}


def _select(
    backend: Backend, inputs: Mapping[str, Array], here: Mapping[str, Array], logits: Array
) -> dict[str, Array]:
    """Run the selection stage of one scale: the smooth one where its noise is given.

    Where the backend cannot sort as many codes as top-p alone takes, the one that need not.
    """
    stage = "select_smooth" if "gumbel" in here else "select"
    own = (*_SELECT, *(_SMOOTH if stage == "select_smooth" else ()))
    ranks, most = inputs["ranks"], backend.max_ranks
    if most is not None and ranks.shape[0] > most:
        stage, ranks = f"{stage}_nucleus", inputs.get("top_k_ranks", ranks)
        if ranks.shape[0] > most:
            raise ConfigError(
                f"top_k above {most} is more than backend {backend.name} can sort; use "
                f"--top-k {most} or less, 0 for none, or another backend"
            )
    settings = {name: inputs[name] for name in _SETTINGS}
    feeds = {"logits": logits, "ranks": ranks, **{n: here[n] for n in own}, **settings}
    return backend.run(stage, feeds)


def _kv_shape(backend: Backend, config: VarConfig, rows: int) -> KVShape:
    """Return the size of the cache for all scales."""
    predictor = config.predictor
    return KVShape(
        num_layers=predictor.depth,
        num_tokens=config.num_tokens,
        rows=rows,
        num_heads=predictor.num_heads,
        head_width=predictor.head_width,
        dtype=backend.kv_dtype(),
    )
