"""Learning-rate and weight-decay schedules as functions of the optimizer step.

Source: github.com/FoundationVision/VAR, utils/lr_control.py.
"""

import math
from typing import Literal, TypeAlias

ScheduleKind: TypeAlias = Literal["constant", "cos", "lin", "lin0", "lin00", "exp"]

# Fraction of the steps after warm-up during which the rate stays at its peak.
_FLAT = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0, "exp": 0.15}


def lr_ratio(
    step: int,
    num_steps: int,
    *,
    kind: str,
    warmup_steps: float,
    warmup_start: float,
    end: float,
) -> float:
    """Return the learning rate of `step` (0 .. num_steps - 1) over its peak.

    Linear warm-up from `warmup_start` over `warmup_steps`, then `kind` down to `end`. `lin<f>` (such as "lin0.4")
    stays flat for the fraction f, then falls linearly; "lin", "lin0" and "lin00" are f = 0.15, 0.05 and 0.
    """
    warmup = round(warmup_steps)
    if step < warmup:
        return warmup_start + (1 - warmup_start) * step / warmup
    passed = (step - warmup) / max(num_steps - 1 - warmup, 1)
    if kind == "constant":
        return 1.0
    if kind == "cos":
        return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * passed))
    flat = _FLAT[kind] if kind in _FLAT else float(kind.removeprefix("lin"))
    if passed < flat:
        return 1.0
    if kind == "exp":
        return math.exp((passed - flat) / (1 - flat) * math.log(end))
    return end + (1 - end) * (1 - passed) / (1 - flat)


def weight_decay(step: int, num_steps: int, *, start: float, end: float) -> float:
    """Return the weight decay of `step`: half a cosine from `start` to `end`, without warm-up."""
    phase = math.cos(math.pi * step / max(num_steps - 1, 1))
    return end + (start - end) * (0.5 + 0.5 * phase)
