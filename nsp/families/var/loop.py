"""The scale loop of the family `var`: prompt -> condition -> scale steps -> latent, on any backend.

It does no arithmetic on tensors: it hands over views and advances counters. It is a generator and
yields after every scale step, so the caller owns progress, previews and early stop.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nsp.families.var.config import VarConfig
from nsp.layers.resample import area_matrix, bicubic_matrix
from nsp.runtime.backends.base import Backend
from nsp.runtime.kv_arena import Array, KVShape
from nsp.runtime.sampling import SamplingConfig, scale_ratios


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


def generate(backend: Backend, config: VarConfig, request: Request) -> Iterator[ScaleStep]:
    """Yield one ScaleStep per scale; the last one's latent is the decoder's input."""
    sampling, batch = request.sampling, request.batch
    guidance = sampling.guidance_per_scale(config.num_scales)
    guided = any(value != 1 for value in guidance)
    rows = batch * (2 if guided else 1)
    conditioning = dict(_condition(backend, config, request, guided=guided))
    x = conditioning.pop("x")
    plan = _ScalePlan(backend, config, request)
    arena = backend.arena(_kv_shape(backend, config, rows))
    image_rows = backend.upload(np.tile(np.arange(batch, dtype=np.int64), rows // batch))
    side = config.latent_side
    latent = backend.upload(np.zeros((batch, config.vae.latent_channels, side, side), np.float32))
    for scale, length in enumerate(plan.lengths):
        stepped = backend.run(
            "step",
            {"x": x, "positions": plan.positions[scale], **conditioning, **arena.past()},
            arena.new(length),
        )
        arena.advance(length)
        selected = plan.select(scale, stepped["logits"], guidance[scale])
        grid = config.patch_nums[scale]
        codes = selected["codes"].reshape((batch, grid, grid, config.vae.latent_channels))
        grown = backend.run(
            "accumulate",
            {"codes": codes, "latent": latent, "rows": image_rows, **plan.resize(scale)},
        )
        latent, x = grown["new_latent"], grown["x"]
        yield ScaleStep(scale, config.num_scales, selected["tokens"], selected["guided"], latent)


def _condition(
    backend: Backend, config: VarConfig, request: Request, *, guided: bool
) -> dict[str, Array]:
    """Return the outputs of `condition` for the batch; when guided, null rows come behind it."""
    if config.text is None:
        ids = request.class_ids
        assert ids is not None
        null = np.full_like(ids, config.num_classes)
        both = np.concatenate([ids, null]) if guided else ids
        return backend.run("condition", {"class_ids": backend.upload(both)})
    prompts, rows = _unique_prompts(config, request, guided=guided)
    encoded = backend.run("text_encoder", {"token_ids": backend.upload(prompts)})
    return backend.run("condition", {**encoded, "rows": backend.upload(rows)})


def _unique_prompts(
    config: VarConfig, request: Request, *, guided: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return distinct prompts (N, T) to encode, and the prompt of every transformer row (G,).

    Row N is the null condition: a learned one inside the stage, else "" encoded as the last prompt.
    """
    assert request.token_ids is not None
    assert config.text is not None
    prompts, rows = np.unique(request.token_ids, axis=0, return_inverse=True)
    rows = rows.reshape(-1).astype(np.int64)
    if not guided:
        return prompts, rows
    null_rows = np.full(request.batch, len(prompts), np.int64)
    if config.text.null == "empty_prompt":
        assert request.null_token_ids is not None
        prompts = np.concatenate([prompts, request.null_token_ids])
    return prompts, np.concatenate([rows, null_rows])


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


class _ScalePlan:
    """What the scales need and is known beforehand: positions, random numbers, matrices."""

    def __init__(self, backend: Backend, config: VarConfig, request: Request) -> None:
        self.backend, self.config, self.request = backend, config, request
        self.lengths = [side**2 for side in config.patch_nums]
        stops = np.cumsum(self.lengths)
        self._slices = [slice(int(e - n), int(e)) for e, n in zip(stops, self.lengths, strict=True)]
        forced = request.forced_tokens
        if forced is None:
            forced = np.full(request.uniforms.shape, -1, np.int64)
        self.positions = self._per_scale(np.arange(config.num_tokens)[None], squeeze=True)
        self._uniforms = self._per_scale(request.uniforms)
        self._forced = self._per_scale(forced)
        sampling = request.sampling
        ranks = np.arange(sampling.num_ranks(config.vae.vocab_size), dtype=np.int64)
        self._settings = {
            "temperature": backend.scalar(sampling.temperature),
            "top_p": backend.scalar(sampling.nucleus),
            "ranks": backend.upload(ranks),
        }
        self._ratios = scale_ratios(config.num_scales)
        self._phis = config.vae.phi_indices(config.num_scales)

    def _per_scale(self, rows: NDArray[np.generic], *, squeeze: bool = False) -> list[Array]:
        """Return the columns of every scale as contiguous device arrays."""
        parts = [np.ascontiguousarray(rows[:, part]) for part in self._slices]
        return [self.backend.upload(part[0] if squeeze else part) for part in parts]

    def select(self, scale: int, logits: Array, guidance: float) -> dict[str, Array]:
        """Run the selection stage of one scale."""
        feeds = {
            "logits": logits,
            "uniforms": self._uniforms[scale],
            "forced": self._forced[scale],
            "guidance": self.backend.scalar(guidance),
            **self._settings,
        }
        gumbel = self.request.gumbel
        if not self.request.sampling.more_smooth:
            return self.backend.run("select", feeds)
        assert gumbel is not None
        part = np.ascontiguousarray(gumbel[:, self._slices[scale]])
        feeds |= {
            "gumbel": self.backend.upload(part),
            "ratio": self.backend.scalar(self._ratios[scale]),
        }
        return self.backend.run("select_smooth", feeds)

    def resize(self, scale: int) -> dict[str, Array]:
        """Return the matrices and the phi of one scale.

        The last scale has no next grid and gets the first one's.
        """
        sides = self.config.patch_nums
        following = sides[(scale + 1) % len(sides)]
        upload = self.backend.upload
        up = upload(bicubic_matrix(sides[scale], sides[-1]))
        down = upload(area_matrix(sides[-1], following))
        phi = self.backend.scalar(self._phis[scale], "int64")
        return {"up_rows": up, "up_cols": up, "down_rows": down, "down_cols": down, "phi": phi}
