"""Samplers as tables: a step of any of them is the same few sums, with other numbers.

    x_0 = clip(a·x + b·prediction, ±c)
    next x = d·x + e·prediction + f0·x_0 + f1·x_0' + f2·x_0'' + n·noise

x_0' and x_0'' are those of the two steps before. So one engine stage, with the numbers of a step as
an input, runs every sampler; a new one needs no new export. A sampler is written below as it is in
its paper, on `Form`: a linear form of the quantities that a step knows. The numbers are those of
diffusers' scheduler of the same name, computed in float64.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nsp.diffusion.noise import Noise
from nsp.errors import ConfigError

Sampler: TypeAlias = Literal["ddpm", "ddim", "euler", "euler_ancestral", "dpmpp_2m", "unipc"]

COLUMNS = ("a", "b", "c", "d", "e", "f0", "f1", "f2", "n", "input_scale")
NO_CLIP = 1e30  # and not infinity: 0 times infinity is no number
HISTORY = 2  # predictions of x_0 before the present one that a step can use
_TABLES = 64  # kept: every order of a batch asks for its own, several times
_LEAST_KEPT = 2.0**-24  # A of pure noise where a sampler divides by it, as in diffusers


@dataclass(frozen=True, eq=False)
class Table:
    """All steps of one image."""

    timesteps: NDArray[np.float32]  # (S,) that the model is told
    rows: NDArray[np.float32]  # (S, 10), in the order of COLUMNS
    # The latent at the beginning of every step and after the last one is levels[i, 0]·x_0 +
    # levels[i, 1]·noise: what image-to-image begins with, and in-painting keeps outside its mask.
    levels: NDArray[np.float32]  # (S + 1, 2)
    start_scale: float  # times standard noise: the first latent without a picture

    @property
    def draws_noise(self) -> bool:
        """Whether any step adds noise."""
        return bool(self.rows[:, COLUMNS.index("n")].any())


@dataclass(frozen=True)
class Form:
    """A sum of the quantities of one step, each times a number."""

    x: float = 0.0
    prediction: float = 0.0
    x0: float = 0.0
    x0_1: float = 0.0  # one step before
    x0_2: float = 0.0  # two steps before
    noise: float = 0.0

    def __add__(self, other: "Form") -> "Form":
        """Return the sum."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Form(*(left + right for left, right in pairs))

    def __sub__(self, other: "Form") -> "Form":
        """Return the difference."""
        return self + other * -1

    def __mul__(self, factor: float) -> "Form":
        """Return the form with all numbers multiplied."""
        return Form(*(each * factor for each in dataclasses.astuple(self)))

    def one_step_later(self) -> "Form":
        """Return a form of x_0 and x_0' alone as the next step knows it."""
        return Form(x0_1=self.x0, x0_2=self.x0_1)


_X, _PREDICTION, _X0 = Form(x=1), Form(prediction=1), Form(x0=1)
_NOISE = Form(noise=1)
_PAST = (_X0, Form(x0_1=1), Form(x0_2=1))


@dataclass(frozen=True)
class _Step:
    """One row on its way: the sampler's sums, and what the model is told and predicts."""

    timestep: float
    x0: Form
    following: Form
    clip: float | None = None
    input_scale: float = 1.0


@lru_cache(maxsize=_TABLES)
def table(
    noise: Noise, sampler: Sampler, num_steps: int, *, eta: float = 0.0, strength: float = 1.0
) -> Table:
    """Return the steps of one image.

    `eta` is DDIM's share of random noise, from 0 to 1. With a `strength` below 1 only the last
    steps are made, which change a given picture by so much. Raises ConfigError for a number of
    steps that the sampler cannot make.
    """
    if not 1 <= num_steps <= noise.num_timesteps:
        raise ConfigError(f"num_steps={num_steps} must be from 1 to {noise.num_timesteps}")
    if not 0 < strength <= 1:
        raise ConfigError(f"strength={strength:g} must be above 0 and at most 1")
    # As image-to-image of diffusers counts; one step at least, so that the picture is decoded.
    first = num_steps - max(1, min(int(num_steps * strength), num_steps))
    return _SAMPLERS[sampler](_Plan(noise, num_steps, first, eta))


@dataclass(frozen=True)
class _Plan:
    """What is asked of a sampler."""

    noise: Noise
    num_steps: int
    first: int  # the step that sampling begins with
    eta: float


def _spaced(
    noise: Noise, num_steps: int, *, one_more: bool = False, whole: bool = True
) -> NDArray[np.float64]:
    """Return the timesteps of all steps, the noisiest first.

    `one_more` spaces them as if there were another, last one, as multistep solvers of diffusers do.
    """
    total = noise.num_timesteps
    match noise.spacing:
        case "leading":
            between = total // (num_steps + one_more)
            if not between:
                raise ConfigError(f"this sampler makes at most {total - 1} steps, not {num_steps}")
            found = np.arange(num_steps + one_more)[::-1] * float(between) + noise.steps_offset
        case "trailing":
            found = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
        case "linspace":
            found = np.linspace(0, total - 1, num_steps + one_more)[::-1]
            found = np.round(found) if whole else found
    if found[0] >= total:
        raise ConfigError(
            f"steps_offset={noise.steps_offset} leads beyond timestep {total - 1} with {num_steps} "
            "steps"
        )
    return np.asarray(found[:num_steps], np.float64)


def _predicted(noise: Noise, signal: float, sigma: float) -> tuple[Form, Form]:
    """Return x_0 and ε by the model's prediction for a latent signal·x_0 + sigma·ε."""
    match noise.prediction:
        case "epsilon":
            return (_X - _PREDICTION * sigma) * (1 / signal), _PREDICTION
        case "v_prediction":
            return (
                _X * signal - _PREDICTION * sigma,
                _PREDICTION * signal + _X * sigma,
            )
        case "sample":
            return _PREDICTION, (_X - _PREDICTION * signal) * (1 / sigma)


def _finished(
    plan: _Plan, steps: Sequence[_Step], levels: Sequence[tuple[float, float]], start: float
) -> Table:
    """Return the table of the steps from the first one that is made."""
    rows = [
        (
            *(step.x0.x, step.x0.prediction, NO_CLIP if step.clip is None else step.clip),
            *dataclasses.astuple(step.following),
            step.input_scale,
        )
        for step in steps[plan.first :]
    ]
    return Table(
        np.array([step.timestep for step in steps[plan.first :]], np.float32),
        np.array(rows, np.float32),
        np.array(levels[plan.first :], np.float32),
        start,
    )


def _start(noise: Noise, kept: float) -> float:
    return math.sqrt(1 - kept) if noise.scaled_start else 1.0


def _ddpm(plan: _Plan) -> Table:
    """Ho et al., "Denoising Diffusion Probabilistic Models", equations 6 and 7."""
    noise, all_kept = plan.noise, plan.noise.kept()
    times = _spaced(noise, plan.num_steps).astype(int)
    kept = [*all_kept[times], 1.0]
    steps = []
    for index, time in enumerate(times):
        now, then = kept[index], kept[index + 1]
        alpha = now / then
        x0, _ = _predicted(noise, math.sqrt(now), math.sqrt(1 - now))
        mean = _X0 * (math.sqrt(then) * (1 - alpha) / (1 - now)) + _X * (
            math.sqrt(alpha) * (1 - then) / (1 - now)
        )
        variance = max((1 - then) / (1 - now) * (1 - alpha), 1e-20) if time > 0 else 0.0
        steps.append(_Step(time, x0, mean + _NOISE * math.sqrt(variance), noise.clip))
    return _finished(plan, steps, _preserving(kept), _start(noise, kept[0]))


def _ddim(plan: _Plan) -> Table:
    """Song, Meng, Ermon, "Denoising Diffusion Implicit Models", equations 12 and 16.

    The direction is not computed again where x_0 is clipped.
    """
    noise, all_kept = plan.noise, plan.noise.kept()
    times = _spaced(noise, plan.num_steps).astype(int)
    before = times - noise.num_timesteps // plan.num_steps
    last = all_kept[0] if noise.ends_at_first else 1.0
    steps, kept = [], []
    for time, following in zip(times, before, strict=True):
        now, then = all_kept[time], all_kept[following] if following >= 0 else last
        x0, direction = _predicted(noise, math.sqrt(now), math.sqrt(1 - now))
        sigma = plan.eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        following_x = (
            _X0 * math.sqrt(then)
            + direction * math.sqrt(max(1 - then - sigma**2, 0.0))
            + _NOISE * sigma
        )
        steps.append(_Step(time, x0, following_x, noise.clip))
        kept.append(now)
    return _finished(plan, steps, _preserving([*kept, last]), _start(noise, kept[0]))


def _preserving(kept: Sequence[float]) -> list[tuple[float, float]]:
    """Return the shares of picture and noise where the variance stays 1."""
    return [(math.sqrt(each), math.sqrt(1 - each)) for each in kept]


def _sigmas(plan: _Plan, times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return noise over signal at every timestep, and 0 after the last one (S + 1,)."""
    kept = np.maximum(plan.noise.kept(), _LEAST_KEPT)
    every = np.sqrt((1 - kept) / kept)
    return np.append(np.interp(times, np.arange(len(every)), every), 0.0)


def _euler(plan: _Plan) -> Table:
    """Karras et al., "Elucidating the Design Space", algorithm 2 without churn: x_0 + σ·ε."""
    return _euler_like(plan, ancestral=False)


def _euler_ancestral(plan: _Plan) -> Table:
    """As `_euler`, with a part of the noise drawn again (k-diffusion, sample_euler_ancestral)."""
    return _euler_like(plan, ancestral=True)


def _euler_like(plan: _Plan, *, ancestral: bool) -> Table:
    noise = plan.noise
    times = _spaced(noise, plan.num_steps, whole=False)
    sigmas = _sigmas(plan, times)
    steps = []
    for index, time in enumerate(times):
        now, then = sigmas[index], sigmas[index + 1]
        scale = 1 / math.sqrt(now**2 + 1)
        x0, _ = _predicted(noise, scale, now * scale)
        # The prediction is for the scaled latent, this x is x_0 + σ·ε.
        x0 = dataclasses.replace(x0, x=x0.x * scale)
        drawn = math.sqrt(then**2 * (now**2 - then**2) / now**2) if ancestral else 0.0
        down = math.sqrt(max(then**2 - drawn**2, 0.0))
        following = _X + (_X - _X0) * ((down - now) / now) + _NOISE * drawn
        steps.append(_Step(time, x0, following, input_scale=scale))
    largest = sigmas[0]
    start = largest if noise.spacing in ("linspace", "trailing") else math.hypot(largest, 1)
    return _finished(plan, steps, [(1.0, sigma) for sigma in sigmas], start)


@dataclass(frozen=True)
class _Level:
    """A noise level of a variance-preserving process, by its ratio of noise to signal."""

    ratio: float

    @property
    def signal(self) -> float:
        return 1 / math.sqrt(self.ratio**2 + 1)

    @property
    def sigma(self) -> float:
        return self.ratio * self.signal

    @property
    def log_ratio(self) -> float:
        """λ: the logarithm of signal over noise."""
        return -math.log(self.ratio) if self.ratio else math.inf


def _multistep(plan: _Plan) -> tuple[NDArray[np.float64], list[_Level]]:
    times = _spaced(plan.noise, plan.num_steps, one_more=True)
    return times, [_Level(float(each)) for each in _sigmas(plan, times)]


def _with_levels(plan: _Plan, steps: Sequence[_Step], levels: Sequence[_Level]) -> Table:
    shares = [(level.signal, level.sigma) for level in levels]
    start = levels[0].sigma if plan.noise.scaled_start else 1.0
    return _finished(plan, steps, shares, start)


def _dpmpp_2m(plan: _Plan) -> Table:
    """Lu et al., "DPM-Solver++", algorithm 2, with its first and its last step of first order."""
    times, levels = _multistep(plan)
    steps = []
    for index, time in enumerate(times):
        now, then = levels[index], levels[index + 1]
        x0, _ = _predicted(plan.noise, now.signal, now.sigma)
        width = then.log_ratio - now.log_ratio
        slope = Form()
        if plan.first < index < plan.num_steps - 1:
            ratio = (now.log_ratio - levels[index - 1].log_ratio) / width
            slope = (_PAST[0] - _PAST[1]) * (0.5 / ratio)
        following = _X * (then.sigma / now.sigma) - (_X0 + slope) * (
            then.signal * math.expm1(-width)
        )
        steps.append(_Step(time, x0, following))
    return _with_levels(plan, steps, levels)


def _unipc(plan: _Plan) -> Table:
    """Zhao et al., "UniPC", of order 2 with B(h) = e^h - 1; its corrector is a part of the step.

    A step first corrects x by the x_0 that was predicted at it. The latent before the last
    prediction is gone by then, but not needed: x is that latent, scaled, plus a form of older x_0.
    """
    times, levels = _multistep(plan)
    steps: list[_Step] = []
    change = Form()  # what the prediction before added to the scaled latent, as this step knows it
    order = 0
    for index, time in enumerate(times):
        now, then = levels[index], levels[index + 1]
        x0, _ = _predicted(plan.noise, now.signal, now.sigma)
        corrected = _X
        if index > plan.first:
            older = levels[index - 2] if order > 1 else None
            corrected = _X - change + _uni_c(levels[index - 1], now, older)
        order = min(2, plan.num_steps - index, index - plan.first + 1)
        added = _uni_p(now, then, levels[index - 1] if order > 1 else None)
        steps.append(_Step(time, x0, corrected * (then.sigma / now.sigma) + added))
        change = added.one_step_later()
    return _with_levels(plan, steps, levels)


def _uni_p(now: _Level, then: _Level, older: _Level | None) -> Form:
    """Return what UniP adds to the scaled latent, from x_0 and perhaps the one before."""
    width = then.log_ratio - now.log_ratio
    gain = then.signal * math.expm1(-width)
    slope = Form()
    if older is not None:
        slope = (_PAST[1] - _PAST[0]) * (0.5 * width / (older.log_ratio - now.log_ratio))
    return (_PAST[0] + slope) * -gain


def _uni_c(before: _Level, now: _Level, older: _Level | None) -> Form:
    """Return what UniC adds in place of UniP, with the new x_0 and the one or two before."""
    width = now.log_ratio - before.log_ratio
    gain = math.expm1(-width)
    newest = _PAST[0] - _PAST[1]
    if older is None:
        return (_PAST[1] + newest * 0.5) * (-now.signal * gain)
    ratio = (older.log_ratio - before.log_ratio) / width
    phi = gain / -width - 1
    wanted = [phi / gain, (phi / -width - 0.5) * 2 / gain]
    weights = np.linalg.solve(np.array([[1.0, 1.0], [ratio, 1.0]]), np.array(wanted))
    bend = (_PAST[2] - _PAST[1]) * (float(weights[0]) / ratio) + newest * float(weights[1])
    return (_PAST[1] + bend) * (-now.signal * gain)


_SAMPLERS: Mapping[str, Callable[[_Plan], Table]] = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "euler": _euler,
    "euler_ancestral": _euler_ancestral,
    "dpmpp_2m": _dpmpp_2m,
    "unipc": _unipc,
}
SAMPLERS: tuple[str, ...] = tuple(_SAMPLERS)
