"""Measures how closely one pipeline computes what another does, step by step, for any family.

Fed: both take the baseline's tokens, so every step is compared on equal inputs; this needs a family
whose orders may carry tokens. Free: each goes its own way with the same random numbers, so one
early flip may change the rest. Axes: B images, L tokens of a part, V codes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.benchmarks.contest.rounds import orders_of
from nsp.benchmarks.contest.steps import Group, group_steps
from nsp.benchmarks.record.parity import Flip, Parity, StepParity
from nsp.errors import ParityError
from nsp.family.order import Order, stream
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.results import joined

Floats = NDArray[np.float32]
MAX_FLIPS = 100  # recorded one by one; a broken model flips nearly every token
FORCED, UNIFORMS = "forced_tokens", "uniforms"  # what an order may carry to be fed


@dataclass(frozen=True)
class _Trace:
    """What one pipeline made of one batch or several, in parts of the loop."""

    groups: Sequence[Group]
    latents: list[Floats | None]  # after each part
    tokens: list[NDArray[np.int64] | None]  # (B, L)
    logits: list[Floats | None]  # (B, L, V) guided, before temperature and filters
    image: Floats  # (B, 3, H, W) in [0, 1]


@dataclass(frozen=True)
class _Traces:
    """One batch by both: the contender fed with the baseline's tokens, and free."""

    baseline: _Trace
    fed: _Trace | None
    free: _Trace
    uniforms: Floats | None  # (B, L of all parts)


def compare(
    baseline: Pipeline,
    contender: Pipeline,
    requests: Sequence[Mapping[str, Any]],
    *,
    names: tuple[str, str] = ("baseline", "contender"),
    conditions: Sequence[str] = (),
) -> Parity:
    """Return the parity of `contender` with `baseline` over all requests, a batch each.

    Both take the contender's sampling settings. Raises ParityError for numbers that are not finite.
    """
    traces = _joined([_traces(baseline, contender, request) for request in requests])
    expected, free = traces.baseline, traces.free
    equal = [_share(a, b) for a, b in zip(expected.tokens, free.tokens, strict=True)]
    diverged = next((n for n, share in enumerate(equal) if share is not None and share < 1), None)
    steps = tuple(
        _step_parity(
            traces, number, group, equal[number], alike=diverged is None or number <= diverged
        )
        for number, group in enumerate(expected.groups)
    )
    first = requests[0]["seed"]
    flips = islice(_flips(traces, contender.sampling), MAX_FLIPS)
    fed = traces.fed or free
    return Parity(
        baseline=names[0],
        contender=names[1],
        conditions=tuple(conditions),
        seed=first if isinstance(first, int) else first[0],
        steps=steps,
        forced=traces.fed is not None,
        num_flips=sum(_num_flips(expected, traces.fed)),
        flips=tuple(flips),
        forced_psnr_db=psnr_db(expected.image, fed.image),
        free_psnr_db=psnr_db(expected.image, free.image),
        first_divergent_step=diverged,
    )


def psnr_db(reference: Floats, other: Floats) -> float | None:
    """Return the peak signal-to-noise ratio of pictures in [0, 1] in dB, None when equal."""
    error = float(np.mean(np.square(reference.astype(np.float64) - other)))
    return -10 * float(np.log10(error)) if error else None


def _traces(baseline: Pipeline, contender: Pipeline, request: Mapping[str, Any]) -> _Traces:
    declared = contender.family.given(contender.config)
    orders, uniforms = orders_of(contender, request), None
    if UNIFORMS in declared:
        shape = declared[UNIFORMS].shape
        drawn = [stream(order.seed).random(shape, np.float32) for order in orders]
        orders = [_carrying(o, UNIFORMS, row) for o, row in zip(orders, drawn, strict=True)]
        uniforms = np.stack(drawn)
    expected, fed = _trace(baseline, orders), None
    tokens = [each for each in expected.tokens if each is not None]
    if FORCED in declared and tokens:
        rows = np.concatenate(tokens, axis=1)
        fed = _trace(
            contender, [_carrying(o, FORCED, r) for o, r in zip(orders, rows, strict=True)]
        )
    found = _Traces(expected, fed, _trace(contender, orders), uniforms)
    for number, group in enumerate(expected.groups):
        one = fed or found.free
        for array in (one.logits[number], one.latents[number]):
            if array is not None and not np.isfinite(array).all():
                raise ParityError(
                    f"{group.name}: the engines' numbers are not finite; "
                    "export again with --fp32, or --bf16 where the device has it"
                )
    return found


def _carrying(order: Order[Any], name: str, array: NDArray[Any]) -> Order[Any]:
    """Return the order with one more given array."""
    return replace(order, given={**order.given, name: array})


def _trace(pipeline: Pipeline, orders: Sequence[Order[Any]]) -> _Trace:
    """Return what a pipeline makes of one batch."""
    kinds, latents, last = [], [], None
    drawn: dict[str, list[NDArray[Any]]] = {"tokens": [], "logits": []}
    for step in pipeline.run(orders, trace=True):
        last = step.latent
        kinds.append((step.unit, last is not None))
        latents.append(None if last is None else pipeline.download(last))
        for name, arrays in drawn.items():
            if name in step.drawn:
                arrays.append(joined(pipeline.download, step.drawn[name]))
    assert last is not None  # the last step ends with a picture
    groups = group_steps(kinds, pipeline.family.grids(pipeline.config))

    def of_group(name: str, group: Group) -> NDArray[Any] | None:
        arrays = drawn[name][group.start : group.stop]
        return np.concatenate(arrays, axis=1) if arrays else None

    return _Trace(
        groups,
        [latents[group.stop - 1] for group in groups],
        [of_group("tokens", group) for group in groups],
        [of_group("logits", group) for group in groups],
        pipeline.decode(last),
    )


def _joined(traces: Sequence[_Traces]) -> _Traces:
    """Return all batches as one."""
    uniforms = [each.uniforms for each in traces if each.uniforms is not None]
    fed = [each.fed for each in traces if each.fed is not None]
    return _Traces(
        _join([each.baseline for each in traces]),
        _join(fed) if fed else None,
        _join([each.free for each in traces]),
        np.concatenate(uniforms) if uniforms else None,
    )


def _join(parts: Sequence[_Trace]) -> _Trace:
    def rows(arrays: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
        found = [array for array in arrays if array is not None]
        return np.concatenate(found) if found else None

    return _Trace(
        parts[0].groups,
        [rows(each) for each in zip(*(part.latents for part in parts), strict=True)],
        [rows(each) for each in zip(*(part.tokens for part in parts), strict=True)],
        [rows(each) for each in zip(*(part.logits for part in parts), strict=True)],
        np.concatenate([part.image for part in parts]),
    )


def _share(a: NDArray[Any] | None, b: NDArray[Any] | None) -> float | None:
    """Return the share of equal tokens."""
    return None if a is None or b is None else float(np.mean(a == b))


def _step_parity(
    traces: _Traces, number: int, group: Group, free_agreement: float | None, *, alike: bool
) -> StepParity:
    """Return the errors of one part; `alike`: both had the same tokens until its beginning."""
    expected, found = traces.baseline, traces.fed or traces.free
    latents, tokens = (expected.latents[number], found.latents[number]), expected.tokens[number]
    values: dict[str, Any] = {"name": group.name}
    if latents[0] is not None and latents[1] is not None:
        values["latent_range"] = float(np.ptp(latents[0]))
        values["latent_max_abs_error"] = float(np.abs(latents[0] - latents[1]).max())
    if tokens is not None:
        values["num_tokens"] = int(tokens.size)
        values["free_token_agreement"] = free_agreement
    if traces.fed is not None:
        values["token_agreement"] = _share(tokens, found.tokens[number])
    wanted, given = expected.logits[number], found.logits[number]
    if wanted is not None and given is not None and (alike or traces.fed is not None):
        values |= _logit_errors(wanted, given)
    return StepParity(**values)


def _logit_errors(expected_BLV: Floats, found_BLV: Floats) -> dict[str, float]:
    error = np.abs(expected_BLV.astype(np.float64) - found_BLV)
    kl = _kl(expected_BLV, found_BLV)
    return {
        "logits_range": float(expected_BLV.max() - expected_BLV.min()),
        "max_abs_error": float(error.max()),
        "mean_abs_error": float(error.mean()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": float(np.mean(expected_BLV.argmax(-1) == found_BLV.argmax(-1))),
    }


def _kl(expected_BLV: Floats, given_BLV: Floats) -> NDArray[np.float64]:
    """Return KL(expected || given) of the softmax distributions (B, L), at least 0."""
    log_p, log_q = _log_softmax(expected_BLV), _log_softmax(given_BLV)
    divergence: NDArray[np.float64] = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return np.maximum(divergence, 0)


def _log_softmax(logits_BLV: Floats) -> NDArray[np.float64]:
    shifted = logits_BLV.astype(np.float64) - logits_BLV.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _num_flips(expected: _Trace, fed: _Trace | None) -> Iterator[int]:
    """Yield how many of the fed tokens differ in each part."""
    for one, other in zip(expected.tokens, fed.tokens if fed else (), strict=fed is not None):
        yield int(np.count_nonzero(one != other))


def _flips(traces: _Traces, sampling: Any) -> Iterator[Flip]:
    """Yield the fed tokens that differ, with how near to the edge each draw was."""
    fed, start = traces.fed, 0
    if fed is None or traces.uniforms is None:
        return
    for step, expected in enumerate(traces.baseline.tokens):
        drawn, logits = fed.tokens[step], (traces.baseline.logits[step], fed.logits[step])
        if expected is None or drawn is None or logits[0] is None or logits[1] is None:
            continue
        for image, position in np.argwhere(expected != drawn):
            cdfs = [_cdf(each[image, position], sampling) for each in logits if each is not None]
            code, other = int(expected[image, position]), int(drawn[image, position])
            uniform = float(traces.uniforms[image, start + position])
            edge = cdfs[0][code] if other > code else (cdfs[0][code - 1] if code else 0.0)
            yield Flip(
                image=int(image),
                step=step,
                position=int(position),
                expected=code,
                drawn=other,
                margin=abs(uniform - float(edge)),
                cdf_error=float(np.abs(cdfs[0] - cdfs[1]).max()),
            )
        start += expected.shape[1]


def _cdf(logits_V: Floats, sampling: Any) -> NDArray[np.float64]:
    """Return the cumulative distribution (V,) that a token is drawn from, filters included."""
    import torch

    from nsp.layers.logits import filter_by_rank

    off = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # settings that a family may lack
    temperature, top_p, top_k = (getattr(sampling, name, value) for name, value in off.items())
    scaled = torch.from_numpy(logits_V)[None, None] / temperature
    filtered = filter_by_rank(
        scaled, torch.tensor([top_p]), torch.tensor([top_k]), torch.arange(len(logits_V))
    )
    cumulative: NDArray[np.float64] = filtered[0, 0].double().softmax(-1).cumsum(-1).numpy()
    return cumulative
