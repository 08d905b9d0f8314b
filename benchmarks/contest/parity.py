"""How closely one pipeline computes what another computes, per scale, given the same numbers.

Teacher-forced: both take the reference's tokens, so every scale is compared on equal inputs.
Free-running: each takes its own, so one early flip may change the rest.
Axes: B images, L tokens of a scale, V codes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.config import Config
from nsp.errors import ParityError
from nsp.families.var.sampling import VarSampling
from nsp.family.gate import Tokens
from nsp.family.order import stream
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.results import Trace

Floats = NDArray[np.float32]
MAX_FLIPS = 100  # recorded one by one; a broken model flips nearly every token


@dataclass(frozen=True, kw_only=True)
class ScaleParity(Config):
    """Errors of one scale over all images, teacher-forced but for the last field."""

    scale: int
    num_tokens: int  # over all images
    logits_range: float  # of the reference, largest minus smallest
    max_abs_error: float
    mean_abs_error: float
    kl_mean: float  # KL(reference || candidate) of the unfiltered distributions, in nats per token
    kl_max: float
    top1_agreement: float  # share of tokens whose most likely code is the same
    token_agreement: float  # share of sampled tokens that are the same
    latent_max_abs_error: float  # of the running latent after this scale
    free_token_agreement: float  # when both run free

    @property
    def max_relative_error(self) -> float:
        """Largest error over the range of the reference's logits."""
        return self.max_abs_error / self.logits_range if self.logits_range else 0.0


@dataclass(frozen=True, kw_only=True)
class Flip(Config):
    """A token both drew from the same random number, differently."""

    image: int
    scale: int
    position: int
    expected: int
    drawn: int
    margin: float  # distance of the random number to the edge of the expected code's CDF interval
    cdf_error: float  # largest difference of the two CDFs at this token

    @property
    def explained(self) -> bool:
        """Whether the measured error is large enough to move the draw."""
        return self.margin <= self.cdf_error + 1e-6  # float32 rounding of the running sum


@dataclass(frozen=True, kw_only=True)
class Parity(Config):
    """Parity of a candidate with a reference."""

    reference: str
    candidate: str
    conditions: tuple[str, ...]  # prompts, or class ids in words
    seed: int
    scales: tuple[ScaleParity, ...]
    num_flips: int  # teacher-forced
    flips: tuple[Flip, ...]  # the first hundred of them
    forced_psnr_db: float | None  # of the pictures from the same tokens; None: bit for bit equal
    free_psnr_db: float | None
    first_divergent_scale: int | None  # when both run free; None: all tokens are the same

    @property
    def token_agreement(self) -> float:
        """Share of all sampled tokens that are the same, teacher-forced."""
        return self._mean("token_agreement")

    @property
    def free_token_agreement(self) -> float:
        """Share of all sampled tokens that are the same, free-running."""
        return self._mean("free_token_agreement")

    @property
    def max_relative_error(self) -> float:
        """Largest error of any logit over its scale's range."""
        return max(scale.max_relative_error for scale in self.scales)

    def _mean(self, name: str) -> float:
        shares = [getattr(scale, name) for scale in self.scales]
        return float(np.average(shares, weights=[scale.num_tokens for scale in self.scales]))


@dataclass(frozen=True)
class _Traces:
    """One batch by both pipelines."""

    reference: Trace
    forced: Trace
    free: Trace
    uniforms: Floats  # (B, L of all scales)


def takes_tokens(pipeline: Pipeline) -> bool:
    """Return whether both sides can be given the same tokens and random numbers, scale by scale."""
    family, config, backend = pipeline.family, pipeline.config, pipeline.backend
    if not {"uniforms", "forced_tokens"} <= family.given(config).keys():
        return False
    stages = family.stages(config, kv_layout=backend.kv_layout, dtype=backend.kv_dtype())
    logits = (s.io.outputs[s.gate.logits] for s in stages.values() if isinstance(s.gate, Tokens))
    # Where every step draws one token, a row for each would be no table.
    return any(each.words[1].isidentifier() for each in logits)


def compare(
    reference: Pipeline,
    candidate: Pipeline,
    conditions: Mapping[str, Sequence[Any]],
    *,
    names: tuple[str, str] = ("reference", "candidate"),
    seed: int = 0,
    max_batch: int = 4,
) -> Parity:
    """Return the parity of `candidate` with `reference` over all conditions.

    `conditions` is {"prompts": ...} or {"class_ids": ...}, generated `max_batch` at a time, with
    the candidate's sampling settings. Raises ParityError when a logit is not finite.
    """
    key, values = next(iter(conditions.items()))
    batches = [values[i : i + max_batch] for i in range(0, len(values), max_batch)]
    traces = [_trace(reference, candidate, {key: batch}, seed) for batch in batches]
    joined = _joined(traces)
    scales = tuple(_scale_parity(joined, scale) for scale in range(len(joined.reference.tokens)))
    diverged = [each.scale for each in scales if each.free_token_agreement < 1]
    return Parity(
        reference=names[0],
        candidate=names[1],
        conditions=tuple(str(value) for value in values),
        seed=seed,
        scales=scales,
        num_flips=sum(_num_flips(joined)),
        flips=tuple(islice(_flips(joined, candidate.sampling), MAX_FLIPS)),
        forced_psnr_db=psnr_db(joined.reference.image, joined.forced.image),
        free_psnr_db=psnr_db(joined.reference.image, joined.free.image),
        first_divergent_scale=diverged[0] if diverged else None,
    )


def psnr_db(reference: Floats, candidate: Floats) -> float | None:
    """Return the peak signal-to-noise ratio of pictures in [0, 1] in dB, None when equal."""
    error = float(np.mean(np.square(reference.astype(np.float64) - candidate)))
    return -10 * float(np.log10(error)) if error else None


def _trace(
    reference: Pipeline, candidate: Pipeline, conditions: Mapping[str, Sequence[Any]], seed: int
) -> _Traces:
    batch = len(next(iter(conditions.values())))
    shape = reference.family.given(reference.config)["uniforms"].shape
    uniforms = np.stack([stream(seed + n).random(shape, np.float32) for n in range(batch)])
    settings = {**conditions, "uniforms": uniforms, "trace": True, **candidate.sampling.to_dict()}
    expected = reference.generate(**settings).trace
    assert expected is not None
    tokens = np.concatenate(expected.tokens, axis=1)
    forced = candidate.generate(**settings, forced_tokens=tokens).trace
    free = candidate.generate(**settings).trace
    assert forced is not None
    assert free is not None
    for scale, logits in enumerate(forced.logits):
        if not np.isfinite(logits).all():
            raise ParityError(
                f"scale {scale}: the engines' logits are not finite; "
                "export again with --fp32, or --bf16 where the device has it"
            )
    return _Traces(expected, forced, free, uniforms)


def _joined(traces: Sequence[_Traces]) -> _Traces:
    """Return all batches as one."""

    def join(parts: Sequence[Trace]) -> Trace:
        return Trace(
            tokens=_per_scale([part.tokens for part in parts]),
            logits=_per_scale([part.logits for part in parts]),
            latents=_per_scale([part.latents for part in parts]),
            image=np.concatenate([part.image for part in parts]),
        )

    return _Traces(
        join([t.reference for t in traces]),
        join([t.forced for t in traces]),
        join([t.free for t in traces]),
        np.concatenate([t.uniforms for t in traces]),
    )


def _per_scale(batches: Sequence[list[NDArray[Any]]]) -> list[NDArray[Any]]:
    """Return one array per scale, all batches joined."""
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def _scale_parity(traces: _Traces, scale: int) -> ScaleParity:
    expected, forced = traces.reference.logits[scale], traces.forced.logits[scale]
    error = np.abs(expected.astype(np.float64) - forced)
    kl = _kl(expected, forced)
    tokens = traces.reference.tokens[scale]
    latent = np.abs(traces.reference.latents[scale] - traces.forced.latents[scale])
    return ScaleParity(
        scale=scale,
        num_tokens=int(tokens.size),
        logits_range=float(expected.max() - expected.min()),
        max_abs_error=float(error.max()),
        mean_abs_error=float(error.mean()),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1_agreement=float(np.mean(expected.argmax(-1) == forced.argmax(-1))),
        token_agreement=float(np.mean(tokens == traces.forced.tokens[scale])),
        latent_max_abs_error=float(latent.max()),
        free_token_agreement=float(np.mean(tokens == traces.free.tokens[scale])),
    )


def _kl(expected_BLV: Floats, given_BLV: Floats) -> NDArray[np.float64]:
    """Return KL(expected || given) of the softmax distributions (B, L), at least 0."""
    log_p, log_q = _log_softmax(expected_BLV), _log_softmax(given_BLV)
    divergence: NDArray[np.float64] = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return np.maximum(divergence, 0)


def _log_softmax(logits_BLV: Floats) -> NDArray[np.float64]:
    shifted = logits_BLV.astype(np.float64) - logits_BLV.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _num_flips(traces: _Traces) -> Iterator[int]:
    """Yield how many teacher-forced tokens differ in each scale."""
    for expected, drawn in zip(traces.reference.tokens, traces.forced.tokens, strict=True):
        yield int(np.count_nonzero(expected != drawn))


def _flips(traces: _Traces, sampling: VarSampling) -> Iterator[Flip]:
    """Yield the teacher-forced tokens that differ, with how near to the edge each draw was."""
    start = 0
    for scale, expected in enumerate(traces.reference.tokens):
        drawn = traces.forced.tokens[scale]
        for image, position in np.argwhere(expected != drawn):
            cdfs = [
                _cdf(trace.logits[scale][image, position], sampling)
                for trace in (traces.reference, traces.forced)
            ]
            code, other = int(expected[image, position]), int(drawn[image, position])
            uniform = float(traces.uniforms[image, start + position])
            edge = cdfs[0][code] if other > code else (cdfs[0][code - 1] if code else 0.0)
            yield Flip(
                image=int(image),
                scale=scale,
                position=int(position),
                expected=code,
                drawn=other,
                margin=abs(uniform - float(edge)),
                cdf_error=float(np.abs(cdfs[0] - cdfs[1]).max()),
            )
        start += expected.shape[1]


def _cdf(logits_V: Floats, sampling: VarSampling) -> NDArray[np.float64]:
    """Return the cumulative distribution (V,) that a token is drawn from, filters included."""
    import torch

    from nsp.layers.logits import filter_by_rank

    scaled = torch.from_numpy(logits_V)[None, None] / sampling.temperature
    top_p, top_k = torch.tensor([sampling.top_p]), torch.tensor([sampling.top_k])
    filtered = filter_by_rank(scaled, top_p, top_k, torch.arange(len(logits_V)))
    cumulative: NDArray[np.float64] = filtered[0, 0].double().softmax(-1).cumsum(-1).numpy()
    return cumulative
