"""Parity gates: an exported stage must compute what PyTorch computes, on PyTorch's own inputs.

Every stage gets the inputs of the reference's recorded calls. If the gate is sampled tokens, the
reference's selection draws tokens from the stage's logits with the recorded random numbers, so that
tokens can be compared one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nsp.errors import ParityError
from nsp.export.proof.forced import Repeated, repeat
from nsp.export.proof.gates import LIMITS, difference, problem, psnr_db
from nsp.export.proof.recorded import Recording
from nsp.family.gate import Gate, Psnr, Tokens
from nsp.stage.backend import Backend
from nsp.stage.io import StageIO

if TYPE_CHECKING:
    from nsp.export.proof.flips import TokenFigures

_MOST_UNITS = 16  # parts with results of their own: scales, blocks of tokens, timestep ranges


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A stage under test."""

    stage: str
    io: StageIO
    gate: Gate
    backend: Backend
    precision: str  # precision of the stored stage
    label: str  # for messages: "step (onnxruntime fp16)"


@dataclass
class _OutputErrors:
    """Worst errors of one output over all calls."""

    max_abs: float = 0.0
    mean_abs: float = 0.0
    range: float = 0.0
    relative: float = 0.0


@dataclass
class _Unit:
    """The results of one part of the loop."""

    steps: tuple[int, int]  # the first and the last one
    calls: int = 0
    relative: float = 0.0
    tokens: "TokenFigures | None" = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        figures = {} if self.tokens is None else self.tokens.to_dict()
        return {
            "steps": list(self.steps),
            "calls": self.calls,
            "relative": _short(self.relative),
            **figures,
        }


@dataclass
class _Report:
    """All results of one stage."""

    unit: str
    outputs: dict[str, _OutputErrors] = field(default_factory=dict)
    units: dict[tuple[int, int], _Unit] = field(default_factory=dict)
    psnr_db: float | None = None
    calls: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        result: dict[str, Any] = {
            "calls": self.calls,
            "outputs": {
                name: {key: _short(value) for key, value in vars(errors).items()}
                for name, errors in self.outputs.items()
            },
            "unit": self.unit,
            "units": [self.units[steps].to_dict() for steps in sorted(self.units)],
        }
        if self.psnr_db is not None:
            result["psnr_db"] = round(self.psnr_db, 2)
        return result


def check_stage(
    subject: Subject, recordings: Sequence[Recording], selection: Backend | None = None
) -> dict[str, Any]:
    """Return a stage's results (JSON-ready); raise ParityError when a gate fails.

    `selection` is PyTorch's backend, which draws tokens from the stage's logits; without it only
    the logits are compared.
    """
    report = _Report("scale" if not recordings else recordings[0].unit)
    for recording in recordings:
        for repeated in repeat(subject.stage, subject.io, subject.backend, recording):
            report.calls += 1
            steps = _steps(repeated.call.step, recording.num_steps)
            unit = report.units.setdefault(steps, _Unit(steps))
            unit.calls += 1
            _compare(subject, report, unit, repeated)
            _draw(subject, unit, repeated, selection)
    if not report.calls:
        raise ParityError(
            f"{subject.label}: not checked, because the reference never calls this stage"
        )
    for unit in report.units.values():
        _check_tokens(subject, report.unit, unit)
    return report.to_dict()


def _steps(step: int, num_steps: int) -> tuple[int, int]:
    """Return the first and the last step of a part of the loop with common results."""
    size = -(-num_steps // _MOST_UNITS)
    first = step // size * size
    return first, max(first, min(first + size, num_steps) - 1)


def _compare(subject: Subject, report: _Report, unit: _Unit, repeated: Repeated) -> None:
    """Compare one call's outputs; raise ParityError for an output beyond its limit."""
    limits = LIMITS[subject.precision]
    for name, expected in repeated.call.outputs.items():
        found = repeated.found[name]
        wrong = problem(limits, subject.gate, name, expected, found)
        if wrong is not None:
            raise ParityError(f"{subject.label}: call {report.calls - 1}, {name}: {wrong}")
        apart = difference(expected, found)
        if apart.is_integer:
            continue
        errors = report.outputs.setdefault(name, _OutputErrors())
        if apart.relative >= errors.relative:
            errors.relative, errors.range = apart.relative, apart.range
        errors.max_abs = max(errors.max_abs, apart.max_abs)
        errors.mean_abs = max(errors.mean_abs, apart.mean_abs)
        unit.relative = max(unit.relative, apart.relative)
        if subject.gate == Psnr(name):
            report.psnr_db = min(report.psnr_db or 200.0, psnr_db(expected, found))


def _draw(subject: Subject, unit: _Unit, repeated: Repeated, selection: Backend | None) -> None:
    """Count the different ones of the tokens drawn from the stage's logits."""
    gate, select, found = subject.gate, repeated.call, repeated.found
    if selection is None or not isinstance(gate, Tokens):
        return
    from nsp.export.proof.flips import compare_tokens, redrawn  # torch

    if gate.drawn_by:
        if repeated.following is None or repeated.following.stage not in gate.drawn_by:
            return
        select = repeated.following
        found = redrawn(selection, select, found[gate.logits])
    figures = compare_tokens(select, found)
    unit.tokens = figures if unit.tokens is None else unit.tokens.plus(figures)


def _check_tokens(subject: Subject, name: str, unit: _Unit) -> None:
    """Raise ParityError if too many tokens differ, or one that rounding cannot explain."""
    if unit.tokens is None:
        return
    first, last = unit.steps
    where = f"{subject.label}: {name} {first}" + (f" to {last}" if last > first else "")
    figures, limits = unit.tokens, LIMITS[subject.precision]
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


def _short(value: float) -> float:
    return float(f"{value:.4g}")
