"""Parity gates: an exported stage must compute what PyTorch computes, on PyTorch's own inputs.

Every stage is fed the recorded calls of the reference; `step` grows its own cache over all scales.
Its logits go through the reference's `select` with the recorded random numbers, so that sampled
tokens can be compared one by one.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.errors import ParityError
from nsp.export.proof.flips import TokenFigures, compare_tokens
from nsp.export.proof.recorded import LIMITS, Call, Limits, replay
from nsp.export.proof.reference import Reference, psnr_db
from nsp.stage.backend import Backend
from nsp.stage.io import StageIO


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
        replayed = replay(subject.stage, subject.io, subject.backend, batch.calls, batch.kv)
        for index, (call, following, found) in enumerate(replayed):
            report.calls += 1
            _compare(subject, reference, limits, report, (index, call, following, found))
    if not report.calls:
        raise ParityError(f"{subject.label}: the reference never calls this stage; it is unchecked")
    _check_tokens(subject, limits, report)
    return _figures(report, reference)


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
