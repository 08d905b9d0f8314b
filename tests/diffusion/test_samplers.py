"""Samplers as tables: each is diffusers' scheduler of that name, step by step."""

from typing import Any, get_args

import numpy as np
import pytest
import torch

from nsp.diffusion.noise import Noise
from nsp.diffusion.samplers import COLUMNS, SAMPLERS, Sampler, Table, table
from nsp.errors import ConfigError

diffusers = pytest.importorskip("diffusers")

_CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
_SHAPE = (1, 4, 8, 8)


def _scheduler(name: str, noise: Noise) -> Any:
    settings: dict[str, Any] = {
        "num_train_timesteps": noise.num_timesteps,
        "beta_start": noise.beta_start,
        "beta_end": noise.beta_end,
        "beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(noise.betas, noise.betas),
        "prediction_type": noise.prediction,
        "timestep_spacing": noise.spacing,
        "rescale_betas_zero_snr": noise.zero_terminal_snr,
    }
    if name in ("ddpm", "ddim"):
        settings |= {"clip_sample": noise.clip is not None, "clip_sample_range": noise.clip or 1.0}
    if name == "ddim":
        settings["set_alpha_to_one"] = not noise.ends_at_first
    return getattr(diffusers, _CLASSES[name])(**settings)


def _model(x: Any, time: float) -> Any:
    """A stand-in for a model: smooth, bounded, and different at every timestep."""
    return np.float32(0.7) * np.sin(x + np.float32(time / 300)) + np.float32(0.2) * x


def _by_table(steps: Table, noises: np.ndarray) -> list[np.ndarray]:
    x = np.random.default_rng(0).standard_normal(_SHAPE).astype(np.float32) * np.float32(
        steps.start_scale
    )
    past = [np.zeros_like(x), np.zeros_like(x)]
    found = []
    for time, row, noise in zip(steps.timesteps, steps.rows, noises, strict=True):
        k = dict(zip(COLUMNS, row, strict=True))
        prediction = _model(x * k["input_scale"], float(time))
        x0 = np.clip(k["a"] * x + k["b"] * prediction, -k["c"], k["c"])
        x = k["d"] * x + k["e"] * prediction + k["f0"] * x0 + k["n"] * noise
        x += k["f1"] * past[0] + k["f2"] * past[1]
        past = [x0, past[0]]
        found.append(x)
    return found


def _by_diffusers(
    name: str, noise: Noise, num_steps: int, noises: np.ndarray, eta: float, monkeypatch: Any
) -> list[np.ndarray]:
    scheduler = _scheduler(name, noise)
    scheduler.set_timesteps(num_steps)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(_SHAPE).astype(np.float32))
    x = x * scheduler.init_noise_sigma
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    left = iter(noises)
    monkeypatch.setattr(
        module, "randn_tensor", lambda *_a, **_k: torch.from_numpy(next(left)), raising=False
    )
    found = []
    for time in scheduler.timesteps:
        given = scheduler.scale_model_input(x, time)
        prediction = torch.from_numpy(_model(given.numpy(), float(time)))
        extra = {"eta": eta} if name == "ddim" else {}
        x = scheduler.step(prediction, time, x, **extra).prev_sample
        found.append(x.numpy())
    return found


_NOISES = {
    "leading": Noise(clip=1.0),
    "trailing": Noise(spacing="trailing", betas="linear"),
    "linspace": Noise(spacing="linspace", prediction="v_prediction"),
    "cosine": Noise(betas="cosine", prediction="sample", ends_at_first=True),
    "zero": Noise(zero_terminal_snr=True, spacing="trailing", prediction="v_prediction"),
}

# diffusers has no Euler ancestral for a predicted x_0.
_CASES = [
    (name, kind)
    for name in SAMPLERS
    for kind, noise in _NOISES.items()
    if (name, noise.prediction) != ("euler_ancestral", "sample")
]


# diffusers reads torch's arrays in a way that NumPy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize(("name", "kind"), _CASES)
def test_every_step_is_that_of_diffusers(
    name: Sampler, kind: str, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = _NOISES[kind]
    eta = 0.6 if name == "ddim" else 0.0
    noises = np.random.default_rng(1).standard_normal((num_steps, *_SHAPE)).astype(np.float32)
    steps = table(noise, name, num_steps, eta=eta)
    ours = _by_table(steps, noises)
    theirs = _by_diffusers(name, noise, num_steps, noises, eta, monkeypatch)
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        scale = max(1.0, steps.start_scale, float(np.abs(other).max()))  # theirs sums in float32
        assert np.abs(mine - other).max() <= 2e-5 * scale, index


def test_the_cases_cover_every_name() -> None:
    assert set(get_args(Sampler)) == set(SAMPLERS) == set(_CLASSES)


@pytest.mark.parametrize("name", SAMPLERS)
def test_image_to_image_begins_at_its_level_as_if_nothing_came_before(name: Sampler) -> None:
    whole, part = table(Noise(), name, 20), table(Noise(), name, 20, strength=0.5)
    assert len(part.timesteps) == 10
    assert np.array_equal(part.timesteps, whole.timesteps[10:])
    assert np.array_equal(part.levels, whole.levels[10:])
    history = [COLUMNS.index(column) for column in ("f1", "f2")]
    assert not part.rows[0, history].any()  # nothing was predicted before
    if name in ("ddpm", "ddim", "euler", "euler_ancestral"):
        assert np.array_equal(part.rows, whole.rows[10:])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_prediction_follows_the_levels(name: Sampler) -> None:
    rng = np.random.default_rng(0)
    picture, start = rng.standard_normal((2, 4, 8, 8))
    steps = table(Noise(), name, 12)
    levels = steps.levels.astype(np.float64)
    x = levels[0, 0] * picture + levels[0, 1] * start
    past = [np.zeros_like(x)] * 2
    for index, row in enumerate(steps.rows.astype(np.float64)):
        k = dict(zip(COLUMNS, row, strict=True))
        epsilon = (x - levels[index, 0] * picture) / levels[index, 1]
        x0 = k["a"] * x + k["b"] * epsilon
        assert np.allclose(x0, picture, atol=2e-3)
        x = k["d"] * x + k["e"] * epsilon + k["f0"] * x0 + k["f1"] * past[0] + k["f2"] * past[1]
        past = [x0, past[0]]
    if not steps.draws_noise:
        assert np.allclose(x, levels[-1, 0] * picture + levels[-1, 1] * start, atol=5e-3)
    assert np.abs(x - picture).mean() < 0.1


@pytest.mark.parametrize(
    ("noise", "sampler", "num_steps", "strength", "said"),
    [
        (Noise(), "ddim", 0, 1.0, "num_steps=0 must be from 1 to 1000"),
        (Noise(), "ddim", 1001, 1.0, "num_steps=1001 must be from 1 to 1000"),
        (Noise(), "unipc", 1000, 1.0, "at most 999 steps"),
        (Noise(steps_offset=999), "ddim", 10, 1.0, "leads beyond timestep 999"),
        (Noise(), "ddim", 10, 0.0, "strength=0 must be above 0"),
        (Noise(), "ddim", 10, 1.1, "strength=1.1 must be above 0 and at most 1"),
        (Noise(), "ddim", 10, float("nan"), "strength=nan must be"),
    ],
)
def test_a_wrong_plan_is_one_clear_line(
    noise: Noise, sampler: Sampler, num_steps: int, strength: float, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        table(noise, sampler, num_steps, strength=strength)


def test_pure_noise_at_the_end_needs_another_prediction_than_epsilon() -> None:
    with pytest.raises(ConfigError, match="use prediction v_prediction or sample"):
        Noise(zero_terminal_snr=True)
