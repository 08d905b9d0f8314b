"""Parity gates: an exported stage must compute what PyTorch computes, on PyTorch's own inputs.

Every stage is fed the recorded calls of the reference; `step` grows its own cache over all scales.
Its logits go through the reference's `select` with the recorded random numbers, so that sampled
tokens can be compared one by one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.flips import TokenFigures, compare_tokens
from export.reference import Call, Generated, Reference, psnr_db
from nsp.errors import ParityError
from nsp.runtime.backends.base import Backend
from nsp.runtime.io import Axes, StageIO


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a precision must reach."""

    relative_error: float  # max abs error of an output over its range; logits and images aside
    logits_error: float  # the same of logits
    token_agreement: float  # of sampled tokens, per scale
    psnr_db: float  # of decoded images

    def allowed_flips(self, num_tokens: int) -> int:
        """Return how many tokens of a scale may differ: the share allowed, and what chance adds.

        Whether a draw falls beside an edge is luck, of which few tokens have much: three standard
        deviations of that many draws are granted.
        """
        share = 1 - self.token_agreement
        spread = (num_tokens * share * self.token_agreement) ** 0.5
        return int(num_tokens * share + 3 * spread + 1) if share else 0


LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(relative_error=1e-4, logits_error=1e-4, token_agreement=1.0, psnr_db=80),
    # Tokens and images are the gates in half precision; errors are held to what rounding can do.
    "fp16": Limits(relative_error=1e-2, logits_error=2e-2, token_agreement=0.99, psnr_db=45),
    # 8 bits of mantissa for 11: errors eight times as large.
    "bf16": Limits(relative_error=8e-2, logits_error=0.16, token_agreement=0.92, psnr_db=27),
    # Opt-in. Seen with a small trained model: 2.4 % of the range, 86 % of the worst scale.
    "int8": Limits(relative_error=5e-2, logits_error=5e-2, token_agreement=0.8, psnr_db=80),
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A stage under test."""

    stage: str
    io: StageIO
    backend: Backend
    precision: str  # that it is stored in
    label: str  # for messages: "step (onnxruntime fp16)"


@dataclass
class _OutputErrors:
    """Worst errors of one output over all calls."""

    max_abs: float = 0.0
    mean_abs: float = 0.0
    range: float = 0.0
    relative: float = 0.0

    def add(self, expected: NDArray[Any], found: NDArray[Any]) -> float:
        """Count one call and return its relative error."""
        difference = np.abs(expected.astype(np.float64) - found.astype(np.float64))
        span = float(np.ptp(expected)) if expected.size else 0.0
        worst = float(difference.max(initial=0.0))
        if not np.isfinite(worst):
            worst = float("inf")
        relative = worst / span if span else (0.0 if worst == 0 else float("inf"))
        if relative >= self.relative:
            self.relative, self.range = relative, span
        self.max_abs = max(self.max_abs, worst)
        self.mean_abs = max(self.mean_abs, float(difference.mean()) if difference.size else 0.0)
        return relative


@dataclass
class _Report:
    """Everything measured about one stage."""

    outputs: dict[str, _OutputErrors] = field(default_factory=dict)
    scales: list[TokenFigures] = field(default_factory=list)
    psnr_db: float | None = None
    calls: int = 0


def check_stage(subject: Subject, reference: Reference) -> dict[str, Any]:
    """Return a stage's measured figures (JSON-ready); raise ParityError at a missed gate."""
    limits, report = LIMITS[subject.precision], _Report()
    for batch in reference.batches:
        for index, (call, following, found) in enumerate(_replay(subject, batch)):
            report.calls += 1
            _compare(subject, reference, limits, report, (index, call, following, found))
    if not report.calls:
        raise ParityError(f"{subject.label}: the reference never calls this stage; it is unchecked")
    _check_tokens(subject, limits, report)
    return _figures(report, reference)


def _replay(
    subject: Subject, batch: Generated
) -> Iterator[tuple[Call, Call | None, dict[str, NDArray[Any]]]]:
    """Yield every recorded call of the stage, the call after it, and what the stage returns now."""
    backend, io = subject.backend, subject.io
    cached = [name for name in io.inputs if name.startswith("past_")]
    arena = None
    if cached:
        arena = backend.arena(replace(batch.kv, dtype=io.inputs[cached[0]].dtype))
    followers = (*batch.calls[1:], None)
    for call, following in zip(batch.calls, followers, strict=True):
        if call.stage != subject.stage:
            continue
        feeds = {n: _upload(backend, array, io.inputs[n]) for n, array in call.feeds.items()}
        given: Mapping[str, Any] = {}
        if arena is not None:
            feeds |= arena.past()
            given = arena.new(call.num_new)
        results = backend.run(subject.stage, feeds, given)
        if arena is not None:
            arena.advance(call.num_new)
        yield call, following, {name: backend.download(results[name]) for name in call.outputs}


def _upload(backend: Backend, array: NDArray[Any], spec: Axes) -> Any:
    """Return an array of the reference in the dtype the stage takes."""
    if spec.dtype == "bfloat16":  # NumPy has none: the torch backend narrows it
        import torch

        tensor: Any = backend.upload(array)
        return tensor.to(torch.bfloat16)
    return backend.upload(np.asarray(array, spec.dtype))


def _compare(
    subject: Subject,
    reference: Reference,
    limits: Limits,
    report: _Report,
    case: tuple[int, Call, Call | None, dict[str, NDArray[Any]]],
) -> None:
    """Compare one call's outputs; raise ParityError for one beyond its limit."""
    index, call, following, found = case
    for name, expected in call.outputs.items():
        where = f"{subject.label}: call {index}, {name}"
        if np.issubdtype(expected.dtype, np.integer):
            agreement = float(np.mean(expected == found[name]))
            if agreement < 1:
                raise ParityError(f"{where}: {agreement:.2%} of the integers agree; limit 100 %")
            continue
        relative = report.outputs.setdefault(name, _OutputErrors()).add(expected, found[name])
        limit: float | None = limits.relative_error
        if name == "image":
            report.psnr_db = min(report.psnr_db or 200.0, psnr_db(expected, found[name]))
            if report.psnr_db < limits.psnr_db:
                raise ParityError(
                    f"{where}: PSNR {report.psnr_db:.1f} dB; limit {limits.psnr_db} dB"
                )
            limit = None
        elif name == "logits":
            limit = limits.logits_error
            if following is not None and "logits" in following.feeds:
                figures = compare_tokens(reference.pipeline.backend, following, found[name])
                _merge(report.scales, index, figures)
        if not np.isfinite(relative) or (limit is not None and relative > limit):
            raise ParityError(
                f"{where}: max abs error is {relative:.2e} of the range; limit {limit or 'finite'}"
            )


def _merge(scales: list[TokenFigures], index: int, figures: TokenFigures) -> None:
    """Add one call's figures to those of its scale."""
    if index == len(scales):
        scales.append(figures)
    else:
        scales[index] = scales[index].plus(figures)


def _check_tokens(subject: Subject, limits: Limits, report: _Report) -> None:
    """Raise ParityError where too many tokens differ, or one that rounding does not explain."""
    for scale, figures in enumerate(report.scales):
        where = f"{subject.label}: scale {scale}"
        if len(figures.flips) > limits.allowed_flips(figures.num_tokens):
            raise ParityError(
                f"{where}: {figures.agreement:.2%} of {figures.num_tokens} sampled tokens agree; "
                f"limit {limits.token_agreement:.0%}"
            )
        for flip in figures.flips:
            if not flip.is_benign:
                raise ParityError(
                    f"{where}: a token flipped whose margin {flip.margin:.2e} exceeds the measured "
                    f"error {flip.error:.2e}"
                )


def _figures(report: _Report, reference: Reference) -> dict[str, Any]:
    """Return the report as plain values."""
    result: dict[str, Any] = {
        "reference": "PyTorch float32, teacher-forced",
        "images": reference.num_images,
        "calls": report.calls,
        "outputs": {
            name: {key: float(f"{value:.4g}") for key, value in vars(errors).items()}
            for name, errors in report.outputs.items()
        },
    }
    if report.scales:
        result["scales"] = [figures.to_dict() for figures in report.scales]
    if report.psnr_db is not None:
        result["psnr_db"] = round(report.psnr_db, 2)
    return result
