"""Learning-rate and weight-decay schedules as functions of the optimizer step.

Source: github.com/FoundationVision/VAR, utils/lr_control.py; "wsd" is the schedule of
github.com/PKU-YuanGroup/Next-Patch-Prediction for one level of patches.
"""

import math

# Fraction of the steps after warm-up during which the rate stays at its peak.
_FLAT = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0, "exp": 0.15}
_DECAY = 0.2  # share of all steps in which "wsd" falls


def lr_ratio(
    step: int,
    num_steps: int,
    *,
    kind: str,
    warmup_steps: float,
    warmup_start: float,
    end: float,
) -> float:
    """Return the learning rate of `step` (0 .. num_steps - 1) as a fraction of its peak.

    Linear warm-up from `warmup_start` over `warmup_steps`, then `kind` down to `end`: "cos"; "lin",
    "lin0", "lin00" and "exp" stay at the peak for 15, 5, 0 and 15 % of the rest, then fall;
    "lin<f>" (such as "lin0.4") falls slowly for the fraction f, then faster; "constant"; "wsd"
    stays at the peak and falls linearly over the last 20 % of all steps, to `end` after the last.
    """
    warmup = round(warmup_steps)
    if step < warmup:
        return warmup_start + (1 - warmup_start) * step / warmup
    passed = (step - warmup) / max(num_steps - 1 - warmup, 1)
    if kind == "constant":
        return 1.0
    if kind == "wsd":
        fallen = 1 - (num_steps - step) / (_DECAY * num_steps)
        return 1 - (1 - end) * max(fallen, 0.0)
    if kind == "cos":
        return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * passed))
    if kind not in _FLAT:
        return _linear_with_knee(passed, float(kind.removeprefix("lin")), end)
    flat = _FLAT[kind]
    if passed < flat:
        return 1.0
    if kind == "exp":
        return math.exp((passed - flat) / (1 - flat) * math.log(end))
    return end + (1 - end) * (1 - passed) / (1 - flat)


def _linear_with_knee(passed: float, knee: float, end: float) -> float:
    """Return the rate on two straight lines from 1 to `end` that meet at `knee`.

    At `knee` it is halfway between 1 and a straight line down to `end`.
    """
    middle = (1 + end + (1 - end) * (1 - knee)) / 2
    if passed < knee:
        return 1 + (middle - 1) * passed / knee
    return end + (middle - end) * (1 - passed) / (1 - knee)


def weight_decay(step: int, num_steps: int, *, start: float, end: float) -> float:
    """Return the weight decay of `step`: half a cosine from `start` to `end`, without warm-up."""
    phase = math.cos(math.pi * step / max(num_steps - 1, 1))
    return end + (start - end) * (0.5 + 0.5 * phase)
